"""What vLLM's KV depends on besides tokens.

vLLM's block hashes stand for the tokens before a block's end, its multimodal inputs, prompt
embeddings, LoRA name and cache salt. They do not stand for the model, its weights, its
quantization, the place of the worker or the way the bytes of a block are packed: that is here.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.config import OffloadingConfig

from lmcache_core import ConfigError

_SAMPLE, _STEP = 4 << 10, 1 << 20
"""A fingerprint reads so many bytes of the weights, and after so many the next: of every tensor."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def offloaded(config: VllmConfig, offloading: OffloadingConfig) -> dict[str, Any]:
    """Namespace fields, but the layout, for rows of vLLM's native offloading: all workers' bytes.

    Raises ConfigError for models with LoRA adapters.
    """
    if config.lora_config is not None:
        raise ConfigError("LoRA: vLLM offloads by an adapter's name and path, its files may change")
    model, parallel, cut = config.model_config, offloading.parallel, offloading.cache
    tokens = offloading.groups[0].tokens_per_block
    block = SimpleNamespace(dtype=model.dtype, block_size=tokens, head_size=model.get_head_size())
    workers = [parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size]
    return {
        **model_identity(config),
        "memory_format": memory_format(config, offloading, block),
        "extra": {
            **number_identity(config),
            "groups": digest(repr(offloading.groups)),
            "hashes": hash_identity(config, cut.tokens_per_hash),
            "row": f"{offloading.worker_kv_bytes_per_block} {cut.blocks_per_chunk}",
            "workers": f"{parallel.world_size} {workers}",
            "canonical": f"{offloading.canonical_layout} {offloading.replicated_layout}",
        },
    }


def model_identity(config: VllmConfig) -> dict[str, Any]:
    """Namespace fields that say which model it is."""
    model = config.model_config
    return {
        "model": _model_name(model.model),
        "weights": _weights(config),
        "revision": str(model.revision or ""),
        "positions": digest(_positions(model)),
    }


def number_identity(config: VllmConfig) -> dict[str, str]:
    """What else decides which numbers the model computes and vLLM keeps."""
    model = config.model_config
    return {
        "vllm": vllm.__version__,
        "quantization": f"{model.quantization} {model.dtype}",
        "cache": f"{config.cache_config.cache_dtype}",
        "overrides": digest(repr(model.hf_overrides)),
    }


def _model_name(model: str) -> str:
    return Path(model).name if Path(model).is_dir() else model


def memory_format(config: VllmConfig, kv: KVCacheConfig | OffloadingConfig, spec: Any) -> str:
    """Names the packing within a block, which each attention backend chooses for itself."""
    cache = config.cache_config
    backend = getattr(config.attention_config, "backend", None)
    name = f"vllm {vllm.__version__} {current_platform.device_name} {backend}"
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(spec.dtype, spec.block_size, spec.head_size, cache.cache_dtype)
        name += f" {isa}"
    return f"{name} {getattr(kv, 'kv_cache_layout', '')} {spec.block_size}"


def hash_identity(config: VllmConfig, tokens: int) -> str:
    """What vLLM's block hashes, of `tokens` tokens each, depend on besides what they hash."""
    from vllm.v1.core.kv_cache_utils import get_none_hash_seed

    algorithm = config.cache_config.prefix_caching_hash_algo
    return f"{algorithm} {get_none_hash_seed()!r} {tokens}"


def _positions(model: Any) -> dict[str, Any]:
    """The model's config. LongRoPE has factors for short and for long prompts, and vLLM takes those
    of the longest prompt that it would serve."""
    fields = dict(model.hf_config.to_dict())
    for name in ("_name_or_path", "transformers_version"):
        fields.pop(name, None)
    if has_rope(fields, "longrope"):
        fields["max_model_len"] = model.max_model_len
    return fields


def has_rope(fields: dict[str, Any], *kinds: str) -> bool:
    """Whether a model's config names one of these kinds of rotary embeddings."""
    text = json.dumps(fields, default=str)
    return any(f'"{kind}"' in text for kind in kinds)


def digest(value: Any) -> str:
    """128 bits that stand for a text, or for what JSON makes of a value."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _weights(config: VllmConfig) -> str:
    """A fingerprint of the weights: of a directory's files, or the commit of a hub's snapshot.

    Raises ConfigError where neither tells what they are.
    """
    model = config.model_config
    if str(config.load_config.load_format) == "dummy":
        return f"dummy {model.seed}"
    path = Path(model.model)
    if path.exists():
        return _files(path)
    commit = getattr(model.hf_config, "_commit_hash", None)
    if not commit:
        raise ConfigError(f"nothing tells which weights {model.model} are")
    return str(commit)


def _files(path: Path) -> str:
    """Of names, sizes and samples of all weights, so that gigabytes take a second."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in _WEIGHTS and file.is_file()]
    if not files:
        raise ConfigError(f"no weights in {path}: nothing tells which they are")
    state = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        state.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
        with file.open("rb") as data:
            for start in (*range(0, size, _STEP), max(0, size - _SAMPLE)):
                state.update(os.pread(data.fileno(), _SAMPLE, start))
    return state.hexdigest()
