"""How vLLM's KV is cut into chunks: a Namespace for each KV cache group of a worker."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from lmcache_connectors._sharing import shared_namespace
from lmcache_connectors.vllm.chunks import Group
from lmcache_connectors.vllm.identity import (
    digest,
    hash_identity,
    memory_format,
    model_identity,
    number_identity,
    processing_identity,
)
from lmcache_connectors.vllm.packing import Packing
from lmcache_connectors.vllm.packing import packing as packing_of
from lmcache_core import CacheEngine, ConfigError, KVLayout, LayerGroup, Weights
from lmcache_core.connector import depends_on_length
from lmcache_core.serde import DTYPES

SMALL = 512 << 10
"""Bytes up to which neighbouring blocks are stored together. A prompt that parts from a stored one
within a chunk reuses nothing of that chunk, so chunks stay small."""


KV_DTYPES = frozenset(
    (
        *("auto", "float32", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"),
        *("fp8_ds_mla", "nvfp4_ds_mla", "nvfp4", "nvfp4_4over6", "ultraquant_4bit"),
        *("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc"),
        *("int4_per_token_head", "int8_per_token_head", "fp8_per_token_head"),
    )
)
"""vLLM's names of what KV is kept in. A plugin's own may keep a part of it elsewhere."""


class Part(NamedTuple):
    """How a KV cache group is cut."""

    names: tuple[str, ...]
    """Of its layers."""
    spec: Any
    """VLLM's."""
    layout: KVLayout
    window: int | None
    """Tokens that its layers attend to; None for all."""
    packing: Packing | None
    """How chunks come of blocks, where they are not just their bytes."""

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return int(self.spec.block_size)


class Shape:
    """How vLLM's KV is cut into chunks, and whose they are.

    Chunks hold the bytes of vLLM's blocks, whose packing is nobody else's affair; or, where a
    serde looks at the tensors or other engines share them, keys and values in the canonical layout.
    """

    def __init__(
        self, config: VllmConfig, kv: KVCacheConfig, engine: CacheEngine, looked_at: str
    ) -> None:
        """`looked_at`: who looks at the tensors, "" for nobody.

        Raises ConfigError for what cannot be stored: state-space models, caches that are split
        by pipeline stage or context.
        """
        parallel = config.parallel_config
        others = (
            parallel.pipeline_parallel_size,
            parallel.decode_context_parallel_size,
            getattr(parallel, "prefill_context_parallel_size", 1),  # not in vLLM 0.30
        )
        if max(others) > 1:
            raise ConfigError("pipeline and context parallelism are not supported")
        if not config.model_config.is_prefix_caching_supported:
            raise ConfigError("vLLM needs the whole prompt of this model, no prefix can be reused")
        if config.cache_config.cache_dtype not in KV_DTYPES:
            raise ConfigError(f"KV in {config.cache_config.cache_dtype!r}, which is not known")
        self._config, self._kv, self._engine = config, kv, engine
        if getattr(config.cache_config, "calculate_kv_scales", False):
            raise ConfigError("calculate_kv_scales: each engine would scale KV by its first prompt")
        self._looked_at = looked_at
        self.share_as = share_as(config)
        self.chunk = engine.chunk_size
        """Tokens of a chunk; a multiple of `unit`."""
        self.unit = self.chunk if self.share_as else _unit(kv)
        """What a hit is a multiple of, in tokens; every group has it in whole blocks."""
        self.vllm_hashed = hash_block_size(config, kv)
        """Tokens that one of vLLM's block hashes stands for."""
        self.hashed = self.chunk if self.share_as else self.vllm_hashed
        """Tokens that one of `hashes` stands for."""
        blocks = [group.kv_cache_spec.block_size for group in kv.kv_cache_groups]
        if any(block % self.vllm_hashed for block in blocks):
            raise ConfigError(f"blocks of {blocks} tokens, but hashes of {self.vllm_hashed}")
        if self.chunk % _unit(kv):
            raise ConfigError(
                f"share_as: chunk_size must be a multiple of vLLM's blocks of {_unit(kv)} tokens; "
                f"found {self.chunk}"
            )
        if self.share_as and (len(blocks) > 1 or parallel.world_size > 1):
            raise ConfigError("share_as: expected one KV cache group on one device")
        if self.share_as and depends_on_length(config.model_config.hf_config.to_dict()):
            raise ConfigError("share_as: positions that change with a prompt are not shared")

    def hashed_tokens(self, request: Request) -> int:
        """Tokens of a request that vLLM has hashed: none of them is a draft."""
        return len(request.block_hashes) * self.vllm_hashed

    def hashes(self, request: Request) -> Sequence[bytes]:
        """What stands for the prefix up to each multiple of `hashed` tokens: vLLM's block hashes,
        or where chunks are shared with other engines keys of the tokens."""
        if not self.share_as:
            hashes: Sequence[bytes] = request.block_hashes
            return hashes
        tokens = request.all_token_ids[: self.hashed_tokens(request)]
        return self.groups(0, "")[0].namespace.keys(tokens, self.chunk)

    def knows(self, request: Request) -> bool:
        """Whether `hashes` stand for all that a request's KV depends on."""
        others = (request.lora_request, request.mm_features, request.cache_salt)
        return not self.share_as or not any((*others, request.prompt_embeds is not None))

    @property
    def bytes_per_chunk(self) -> int:
        """Of one worker, over all groups."""
        return _bytes_per_token(self._kv) * self.chunk

    @cached_property
    def parts(self) -> list[Part]:
        """How each KV cache group is cut, in vLLM's order."""
        return [self._part(group) for group in self._kv.kv_cache_groups]

    def _part(self, group: Any) -> Part:
        spec = group.kv_cache_spec
        window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None
        packing = self._packing(spec) if self._looked_at else None
        layout = KVLayout(groups=(_layer_group(group.layer_names, spec, packing),))
        return Part(tuple(group.layer_names), spec, layout, window, packing)

    @lru_cache(maxsize=8)  # noqa: B019 - lives as long as the connector
    def groups(self, rank: int, weights: str) -> list[Group]:
        """The KV cache groups of worker `rank`, in vLLM's order. `weights` stands for what all
        workers compute with."""
        return [self._group(part, rank, weights) for part in self.parts]

    def _group(self, part: Part, rank: int, weights: str) -> Group:
        config, spec = self._config, part.spec
        if self.share_as:
            text = config.model_config.hf_text_config
            namespace = shared_namespace(self._engine, self.share_as, text, part.layout)
            return Group(namespace, part.block, part.window, keyed=True)
        packed = "canonical" if part.packing else memory_format(config, self._kv, spec)
        namespace = self._engine.namespace(
            **model_identity(config),
            weights=Weights(digest=weights),
            layout=part.layout,
            rank=rank,
            world=config.parallel_config.tensor_parallel_size,
            memory_format=packed,
            extra={
                **number_identity(config),
                **processing_identity(config.model_config),
                "group": digest([part.names, repr(spec)]),
                "hashes": hash_identity(config, self.vllm_hashed),
                "chunk": str(self.chunk),
            },
        )
        return Group(namespace, part.block, part.window)

    def _packing(self, spec: Any) -> Packing:
        """How vLLM packs keys and values. Raises ConfigError where that is not known."""
        backend = _backend(self._config, spec)
        known = packing_of(backend, spec.dtype, spec.num_kv_heads, spec.block_size, spec.head_size)
        if known is None:
            raise ConfigError(
                f"{self._looked_at} looks at keys and values, and how {backend} packs "
                f"{spec.dtype} is not known; use lossless serdes (zstd)"
            )
        return known


def share_as(config: VllmConfig) -> str:
    """The name under which other engines share this model's KV, or ""."""
    return str(config.kv_transfer_config.kv_connector_extra_config.get("share_as", ""))


def _backend(config: VllmConfig, spec: Any) -> str:
    """The attention backend's name. Where vLLM will choose it, one of those that it chooses: the
    worker proves what is made of it."""
    if current_platform.is_cpu():
        return "CPU_MLA" if isinstance(spec, MLAAttentionSpec) else "CPU_ATTN"
    chosen = getattr(config.attention_config, "backend", None)
    default = "TRITON_MLA" if isinstance(spec, MLAAttentionSpec) else "FLASH_ATTN"
    return str(getattr(chosen, "name", None) or default)


def chunk_tokens(kv: KVCacheConfig, most: int) -> int:
    """Tokens of a chunk: of one block, or of more where a block is small; `most` if that is more
    than a block. Layers with a window keep only the last blocks, so theirs stay alone."""
    unit = chunk = _unit(kv)
    if any(isinstance(group.kv_cache_spec, SlidingWindowSpec) for group in kv.kv_cache_groups):
        return unit
    while 2 * chunk <= most and 2 * chunk * _bytes_per_token(kv) <= SMALL:
        chunk *= 2
    return chunk


def _unit(kv: KVCacheConfig) -> int:
    return math.lcm(*(group.kv_cache_spec.block_size for group in kv.kv_cache_groups))


def _bytes_per_token(kv: KVCacheConfig) -> int:
    return sum(
        len(group.layer_names)
        * group.kv_cache_spec.page_size_bytes
        // group.kv_cache_spec.block_size
        for group in kv.kv_cache_groups
    )


def _layer_group(names: Sequence[str], spec: Any, packing: Packing | None) -> LayerGroup:
    """What a block holds of a group's layers: [kv_heads, tokens, dim] of keys and values, or
    [kv_heads, tokens, bytes of both] as vLLM packs them."""
    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec, MLAAttentionSpec):
        raise ConfigError(f"KV of the kind {type(spec).__name__} is not supported")
    dtype = str(spec.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"KV of the dtype {dtype} is not supported")
    itemsize = spec.dtype.itemsize
    width, rest = divmod(spec.page_size_bytes, spec.num_kv_heads * spec.block_size * itemsize)
    if rest:
        raise ConfigError("padded KV pages are not supported")
    mla = isinstance(spec, MLAAttentionSpec)
    if packing and not mla and width != 2 * spec.head_size:
        raise ConfigError("keys and values of different sizes are only stored as they are")
    window = getattr(spec, "sliding_window", None)
    kind = ("mla" if mla else "sliding" if window else "attention") if packing else "opaque"
    key_dim = width // 2 if packing and not mla else width
    return LayerGroup(
        kind=kind,  # type: ignore[arg-type]
        layers=tuple(_layer_indices(names)),
        kv_heads=spec.num_kv_heads,
        key_dim=key_dim,
        value_dim=width - key_dim,
        dtype=dtype,
        window=window,
    )


def _layer_indices(names: Sequence[str]) -> list[int]:
    found = [re.findall(r"\.(\d+)\.", name) for name in names]
    indices = [int(numbers[0]) for numbers in found if numbers]
    distinct = len(indices) == len(names) and len(set(indices)) == len(indices)
    return indices if distinct else list(range(len(names)))


def hash_block_size(config: VllmConfig, kv: KVCacheConfig) -> int:
    """Tokens that one of vLLM's block hashes stands for."""
    size = getattr(kv, "hash_block_size", None)
    if size is None:  # vLLM 0.30 and 0.31 do not say it there
        from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

        size = resolve_kv_cache_block_sizes(kv, config)[1]
    return int(size)
