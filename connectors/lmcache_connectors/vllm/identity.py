"""What vLLM's KV depends on besides tokens.

vLLM's block hashes stand for the tokens before a block's end, its multimodal inputs, prompt
embeddings, LoRA name and path, and cache salt. They do not stand for the model, its weights, its
quantization, the place of the worker or the way the bytes of a block are packed: that is here.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.config import OffloadingConfig

from lmcache_core import ConfigError
from lmcache_core.connector import config_digest

_PROCESSORS = ("preprocessor", "processor", "video_preprocessor")
"""What makes inputs of images and the like, as Transformers calls the files."""


def offloaded(config: VllmConfig, offloading: OffloadingConfig) -> dict[str, Any]:
    """Namespace fields for the rows of vLLM's native offloading, all but weights and layout.

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
            **processing_identity(config.model_config),
            "groups": digest(repr(offloading.groups)),
            "hashes": hash_identity(config, cut.tokens_per_hash),
            "row": f"{offloading.worker_kv_bytes_per_block} {cut.blocks_per_chunk}",
            "workers": f"{parallel.world_size} {workers}",
            "canonical": f"{offloading.canonical_layout} {offloading.replicated_layout}",
        },
    }


def model_identity(config: VllmConfig) -> dict[str, Any]:
    """Namespace fields that say which model it is, besides its weights. A model's name, a path and
    its spelling are not among them."""
    fields = config.model_config.hf_config.to_dict()
    fields.pop("auto_map", None)  # where code of the model's own lies; see `code.py`
    return {
        "model": " ".join(fields.get("architectures") or ["unknown"]),
        "positions": config_digest(fields),
    }


def processing_identity(model: Any) -> dict[str, str]:
    """What makes inputs of images, video and sound, which vLLM's hashes hold as they were sent:
    the files beside the model that say it. Nothing for a model of texts."""
    if not model.is_multimodal_model:
        return {}
    from vllm.transformers_utils.repo_utils import try_get_local_file

    names = [f"{processor}_config.json" for processor in _PROCESSORS]
    asked = (try_get_local_file(model.model, name, model.revision) for name in names)
    files = [path for path in asked if isinstance(path, Path) and path.is_file()]
    code = {each for path in files for each in path.parent.glob("*.py")}
    texts = [hashlib.blake2b(path.read_bytes()).hexdigest() for path in (*files, *sorted(code))]
    return {"processing": digest(texts)}


def number_identity(config: VllmConfig) -> dict[str, str]:
    """What else decides which numbers the model computes and vLLM keeps."""
    model = config.model_config
    return {
        "vllm": vllm.__version__,
        "quantization": f"{model.quantization} {model.dtype}",
        "cache": f"{config.cache_config.cache_dtype}",
    }


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


def digest(value: Any) -> str:
    """128 bits that stand for a text, or for what JSON makes of a value."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
