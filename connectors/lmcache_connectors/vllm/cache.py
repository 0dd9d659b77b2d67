"""The CacheEngine of a vLLM process: its config, and what it counted since somebody last asked.

The scheduler's side and a worker are in one process or in several, as vLLM likes. In one they
share an engine. In several a tier in private memory would be a different one for each, so such a
tier becomes a pool in shared memory.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

import lmcache_core
from lmcache_connectors.vllm.shape import Shape, chunk_tokens, share_as
from lmcache_core import Config, ConfigError, TierConfig
from lmcache_core.connector import freed_in_children, read_config
from lmcache_core.serde import TensorsToBytes, TensorsToTensors


class Cache:
    """An engine that both sides may hold."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError."""
        self.engine = lmcache_core.open(config)
        self.config = config
        self.counts: defaultdict[str, float] = defaultdict(float)
        """What the connector counts itself; see `stats.py`."""
        self._told: dict[tuple[str, ...], float] = {}
        self._lock = freed_in_children(threading.Lock())

    @property
    def looked_at(self) -> str:
        """The first of the tiers' serdes that makes something of keys and values, or ""."""
        for tier in self.config.tiers:
            for serde in tier.serde:
                of_tensors = isinstance(serde.create(), TensorsToTensors | TensorsToBytes)
                if of_tensors and serde.name != "raw":
                    return f"{tier.where}: {serde.name}"
        return ""

    def shape(self, config: VllmConfig, kv: KVCacheConfig) -> Shape:
        """How vLLM's KV is cut for this cache. Raises ConfigError for what cannot be stored."""
        shared = "share_as" if share_as(config) else ""
        return Shape(config, kv, self.engine, self.looked_at or shared)

    def count(self, name: str, amount: float, *labels: str) -> None:
        """Add to a counter of the connector's own."""
        with self._lock:
            self.counts["|".join((name, *labels))] += amount

    def news(self) -> dict[str, float]:
        """What was counted since the last call, by whichever side: "name|label|label"."""
        with self._lock:
            news, self.counts = dict(self.counts), defaultdict(float)
            stats = self.engine.stats()
            for labels, n in stats.items():
                if n != self._told.get(labels, 0):
                    news["|".join(labels)] = n - self._told.get(labels, 0)
            self._told = stats
        return news


class _Caches:
    """One for each config in this process."""

    def __init__(self) -> None:
        self._used: list[Cache] = []
        """Each as often as it has users."""
        self._lock = freed_in_children(threading.Lock())

    def acquire(self, config: Config) -> Cache:
        with self._lock:
            same = (cache for cache in self._used if cache.config == config)
            cache = next(same, None) or Cache(config)
            self._used.append(cache)
        return cache

    def release(self, cache: Cache) -> None:
        with self._lock:
            self._used.remove(cache)
            if cache in self._used:
                return
        cache.engine.close()


_CACHES = _Caches()


def acquire(config: VllmConfig, kv: KVCacheConfig) -> Cache:
    """The cache that extra_config or the environment describes, for chunks of vLLM's blocks.

    Raises ConfigError.
    """
    ours = read_config(settings(config), "kv_connector_extra_config")
    tiers = ours.tiers if _one_process(config) else tuple(map(_shared, ours.tiers))
    chunk = ours.chunk_size if share_as(config) else chunk_tokens(kv, ours.chunk_size)
    return _CACHES.acquire(ours.model_copy(update={"tiers": tiers, "chunk_size": chunk}))


def release(cache: Cache) -> None:
    """Close it after its last user."""
    _CACHES.release(cache)


def settings(config: VllmConfig) -> dict[str, Any]:
    """What kv_connector_extra_config holds of a cache's config."""
    extra = dict(config.kv_transfer_config.kv_connector_extra_config)
    extra.pop("share_as", None)
    return extra


def _one_process(config: VllmConfig) -> bool:
    return bool(config.parallel_config.distributed_executor_backend == "uni")


def _shared(tier: TierConfig) -> TierConfig:
    """The tier, or in place of private memory a pool that is known by its size."""
    if tier.backend_class.locality != "process":
        return tier
    capacity = getattr(tier.options, "capacity", None)
    if capacity is None:
        raise ConfigError(f"{tier.where}: is one process's, and vLLM has several: use shm instead")
    settings = {"backend": "shm", "capacity": capacity, "pool": f"vllm-{capacity}"}
    kept = {"name": tier.name, "serde": tier.serde, "deadline": tier.deadline}
    return TierConfig.model_validate(settings | kept).model_copy(update={"where": tier.where})
