"""Counters: what `CacheEngine.stats` shows."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from lmcache_core.kv.keys import ChunkKey
from lmcache_core.plugins.hooks import hookimpl


class Counters:
    """Counts everything that the hooks tell, in chunks; `snapshot` is `CacheEngine.stats`."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, ...]] = Counter()
        # Re-entrant: a load that nobody finished may be collected, and counted, at any allocation.
        self._lock = threading.RLock()

    def _add(self, labels: tuple[str, ...], n: int) -> None:
        with self._lock:
            self._counts[labels] += n

    @hookimpl
    def lmcache_stored(self, tier: str, keys: Sequence[ChunkKey], nbytes: int) -> None:
        self._add(("stored", tier), len(keys))
        self._add(("stored_bytes", tier), nbytes)

    @hookimpl
    def lmcache_loaded(self, tier: str, keys: Sequence[ChunkKey], nbytes: int) -> None:
        self._add(("loaded", tier), len(keys))
        self._add(("loaded_bytes", tier), nbytes)

    @hookimpl
    def lmcache_missed(self, tier: str, reason: str, keys: Sequence[ChunkKey]) -> None:
        self._add(("missed", reason, tier), len(keys))

    @hookimpl
    def lmcache_dropped(self, tier: str, reason: str, keys: Sequence[ChunkKey]) -> None:
        self._add(("dropped", reason, tier), len(keys))

    @hookimpl
    def lmcache_evicted(self, tier: str, keys: Sequence[ChunkKey]) -> None:
        self._add(("evicted", tier), len(keys))

    @hookimpl
    def lmcache_tier_state(self, tier: str, path: str, state: str) -> None:
        self._add((f"tier_{state}", path, tier), 1)

    def snapshot(self) -> dict[tuple[str, ...], int]:
        """Counts by (event, labels ...), such as ("missed", "damaged", "disk")."""
        with self._lock:
            return dict(self._counts)
