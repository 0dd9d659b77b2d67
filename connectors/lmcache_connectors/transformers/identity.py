"""What a model computes: its weights, adapters and state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from transformers import PreTrainedModel

from lmcache_connectors._sharing import config_digest
from lmcache_connectors.transformers.refusal import NotCacheable


def refuse_state(model: PreTrainedModel) -> None:
    """Raise NotCacheable where the model computes just now what its weights do not say."""
    if torch.is_autocast_enabled(model.device.type):
        raise NotCacheable("autocast")
    for module in model.modules():
        if _drops(module):
            raise NotCacheable("a model in training mode")
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            function = getattr(hook, "func", hook)
            # Transformers' own only collect outputs, and stay once somebody has asked for them.
            if not str(getattr(function, "__module__", "")).startswith("transformers."):
                raise NotCacheable("a forward hook, which may change what the model computes")


def _drops(module: torch.nn.Module) -> bool:
    """Whether a module may drop something, as in training. Plain layers without dropout do not;
    peft's are in training mode when they are new."""
    if isinstance(module, torch.nn.Dropout):
        return module.training and module.p > 0
    return module.training and not type(module).__module__.startswith(("torch.nn.", "peft."))


def signature(model: PreTrainedModel) -> object:
    """Changes with the weights, without reading them, and with the config."""
    config = model.config.get_text_config(decoder=True)
    return (
        [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in _tensors(model)],
        adapters(model),
        attention(config),
        config_digest(config),
    )


def fingerprint(model: PreTrainedModel) -> str:
    """XXH3-128 over all weights and buffers: names, dtypes, shapes and bytes."""
    state = xxhash.xxh3_128()
    named = (*model.named_parameters(), *model.named_buffers())
    try:
        for name, tensor in named:
            state.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            flat = tensor.detach().cpu().contiguous().view(-1)
            state.update(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise NotCacheable(f"weights that cannot be read ({error})") from error
    return state.hexdigest()


def _tensors(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def adapters(model: PreTrainedModel) -> str:
    """Which adapters are active or merged, and how strongly: no weight of peft tells."""
    if not getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
        return ""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    states = [
        [getattr(m, name, None) for name in names]
        for m in model.modules()
        if hasattr(m, "scaling") and hasattr(m, "active_adapters")
    ]
    return hashlib.blake2b(repr(states).encode(), digest_size=16).hexdigest()


def attention(config: Any) -> str:
    """The name of the attention implementation."""
    return str(getattr(config, "_attn_implementation", ""))
