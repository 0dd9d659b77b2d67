# ruff: noqa: D103 - the hooks document themselves in hooks.py
"""The Prometheus exporter: a plugin like any other, on prometheus_client's default registry."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Counter, Gauge

from lmcache_core.kv.keys import ChunkKey
from lmcache_core.plugins.hooks import hookimpl

_STORED = Counter("lmcache_stored_chunks", "Chunks stored", ["tier"])
_STORED_BYTES = Counter("lmcache_stored_bytes", "Bytes of KV stored", ["tier"])
_LOADED = Counter("lmcache_loaded_chunks", "Chunks loaded", ["tier"])
_LOADED_BYTES = Counter("lmcache_loaded_bytes", "Bytes of KV loaded", ["tier"])
_MISSED = Counter("lmcache_missed_chunks", "Chunks looked for and not had", ["tier", "reason"])
_DROPPED = Counter("lmcache_dropped_chunks", "Chunks not stored", ["tier", "reason"])
_EVICTED = Counter("lmcache_evicted_chunks", "Chunks removed to make room", ["tier"])
_OPEN = Gauge("lmcache_tier_bypassed", "1 while the tier is bypassed", ["tier", "path"])


@hookimpl
def lmcache_stored(tier: str, keys: Sequence[ChunkKey], nbytes: int) -> None:
    _STORED.labels(tier).inc(len(keys))
    _STORED_BYTES.labels(tier).inc(nbytes)


@hookimpl
def lmcache_loaded(tier: str, keys: Sequence[ChunkKey], nbytes: int) -> None:
    _LOADED.labels(tier).inc(len(keys))
    _LOADED_BYTES.labels(tier).inc(nbytes)


@hookimpl
def lmcache_missed(tier: str, reason: str, keys: Sequence[ChunkKey]) -> None:
    _MISSED.labels(tier, reason).inc(len(keys))


@hookimpl
def lmcache_dropped(tier: str, reason: str, keys: Sequence[ChunkKey]) -> None:
    _DROPPED.labels(tier, reason).inc(len(keys))


@hookimpl
def lmcache_evicted(tier: str, keys: Sequence[ChunkKey]) -> None:
    _EVICTED.labels(tier).inc(len(keys))


@hookimpl
def lmcache_tier_state(tier: str, path: str, state: str) -> None:
    _OPEN.labels(tier, path).set(state == "open")
