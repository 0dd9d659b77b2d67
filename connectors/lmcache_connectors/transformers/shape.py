"""What a model's KV is: its layout, and the namespace that it is stored in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmcache_connectors.transformers.identity import Identity
from lmcache_connectors.transformers.layers import Pair
from lmcache_connectors.transformers.refusal import NotCacheable, described
from lmcache_core import KVLayout, LayerGroup, Namespace, Tensors
from lmcache_core.connector import pooled_empty


class Layers(NamedTuple):
    """What the model's layers keep: learned from the cache that one token leaves behind."""

    layout: KVLayout
    devices: list[torch.device]

    @classmethod
    def of(cls, model: PreTrainedModel, argument: str) -> Layers:
        """`argument`: the model's name for a cache. Raises NotCacheable."""
        config = model.config.get_text_config(decoder=True)
        if model.config.is_encoder_decoder:
            raise NotCacheable("an encoder-decoder model")
        if _rope_types(config) & {"dynamic", "longrope"}:
            raise NotCacheable("a position encoding that depends on the prompt's length")
        if any(hasattr(module, "rope_deltas") for module in model.modules()):
            raise NotCacheable("a model whose positions depend on earlier calls")
        layers = _probe(model, argument)
        layout = KVLayout(groups=_groups(layers, config))
        return cls(layout, [layer.keys.device for layer in layers])


class Shape(NamedTuple):
    """What the model's KV is, and whose."""

    identity: Identity
    namespace: Namespace
    devices: list[torch.device]

    def parts(self, tensors: Tensors) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(layer, 0 for keys or 1 for values, [kv_heads, tokens, dim]) of a chunk's tensors."""
        for g, group in enumerate(self.namespace.layout.groups):
            for part, name in enumerate((f"g{g}.k", f"g{g}.v")):
                if name in tensors:
                    for layer, tensor in zip(group.layers, tensors[name], strict=True):
                        yield layer, part, tensor

    def empty(self, rows: int, columns: int) -> list[Pair]:
        """Uninitialised keys and values of each layer, those of a device in one allocation."""
        parts: list[list[torch.Tensor]] = [[] for _ in self.devices]
        for group in self.namespace.layout.groups:
            dtype = getattr(torch, group.dtype)
            for device in dict.fromkeys(self.devices[layer] for layer in group.layers):
                layers = [layer for layer in group.layers if self.devices[layer] == device]
                for dim in (group.key_dim, group.value_dim):
                    shape = (len(layers), rows, group.kv_heads, columns, dim)
                    for layer, tensor in zip(
                        layers, pooled_empty(shape, dtype, device), strict=True
                    ):
                        parts[layer].append(tensor)
        return [(keys, values) for keys, values in parts]


def _probe(model: PreTrainedModel, argument: str) -> list[DynamicLayer]:
    """The cache's layers after one token."""
    try:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        with torch.no_grad():
            model(input_ids=token, use_cache=True, **{argument: cache})
    except Exception as error:
        raise NotCacheable(f"a model that takes no DynamicCache ({described(error)})") from error
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotCacheable(f"a layer that is not indexed by token ({type(layer).__name__})")
        if not layer.is_initialized or layer.keys.dim() != 4 or layer.keys.shape[2] != 1:
            raise NotCacheable("a layer that keeps no KV of its own")
    if not cache.layers:
        raise NotCacheable("a model without KV")
    return list(cache.layers)


def _groups(layers: Sequence[DynamicLayer], config: Any) -> tuple[LayerGroup, ...]:
    """Layers that keep the same thing, together."""
    full = "mla" if getattr(config, "kv_lora_rank", None) else "attention"
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, layer in enumerate(layers):
        window = getattr(layer, "sliding_window", None)
        keys, values = layer.keys, layer.values
        if keys.dtype != values.dtype or keys.shape[:3] != values.shape[:3]:
            raise NotCacheable("keys and values that differ in more than their last dimension")
        what = (window, keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        alike.setdefault(what, []).append(number)
    return tuple(
        LayerGroup(
            kind="sliding" if window else full,  # type: ignore[arg-type]
            layers=tuple(numbers),
            kv_heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            dtype=str(dtype).removeprefix("torch."),
            window=window,
        )
        for (window, heads, key_dim, value_dim, dtype), numbers in alike.items()
    )


def _positions(config: Any) -> dict[str, Any]:
    """What the config says of positions."""
    fields = config.to_dict()
    return {k: v for k, v in fields.items() if "rope" in k or "position" in k or "rotary" in k}


def _rope_types(config: Any) -> set[str]:
    """Every rope_type in the config, whichever way it nests them."""
    found: set[str] = set()
    todo: list[Any] = [_positions(config)]
    while todo:
        item = todo.pop()
        if isinstance(item, Mapping):
            found.update(str(v) for k, v in item.items() if k in ("rope_type", "type"))
            todo += item.values()
    return found
