"""Plugins at work: loading them, calling them safely, and the counters that every engine has."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pluggy

from lmcache_core.errors import ConfigError
from lmcache_core.hooks import Hooks, hookimpl
from lmcache_core.keys import ChunkKey

log = logging.getLogger("lmcache_core")
QUIET_SECONDS = 60.0
"""One line for each kind of trouble in this time."""


class RateLimitedLog:
    """Warnings, at most one of a kind each QUIET_SECONDS, with a count of those left out."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, int]] = {}
        self._lock = threading.RLock()

    def warn(self, kind: str, message: str) -> None:
        """Log `message` unless one of the same `kind` was logged just now."""
        now = time.monotonic()
        with self._lock:
            last, left_out = self._seen.get(kind, (-QUIET_SECONDS, 0))
            quiet = now - last < QUIET_SECONDS
            self._seen[kind] = (last, left_out + 1) if quiet else (now, 0)
        if not quiet:
            log.warning("%s%s", message, f" ({left_out} more like it)" if left_out else "")


LOG = RateLimitedLog()
"""For what goes wrong again and again at run time, in plugins as well."""


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


class Observers:
    """The hooks of one engine: its counters, installed plugins and those handed in."""

    def __init__(self, plugins: Sequence[object] = ()) -> None:
        self.counters = Counters()
        self._manager = pluggy.PluginManager("lmcache_core")
        self._manager.add_hookspecs(Hooks)
        try:
            self._manager.load_setuptools_entrypoints("lmcache_core.plugins")
            for plugin in (self.counters, *plugins):
                self._manager.register(plugin)
        except Exception as error:  # a plugin's import may raise anything
            raise ConfigError(f"a plugin cannot be loaded: {error}") from error

    @classmethod
    def silent(cls) -> Observers:
        """Observers that hear nothing."""
        observers = cls.__new__(cls)
        observers.counters = Counters()
        observers._manager = pluggy.PluginManager("lmcache_core")
        observers._manager.add_hookspecs(Hooks)
        return observers

    def tell(self, hook: str, **arguments: Any) -> list[Any]:
        """Call `hook`; what a plugin raises is logged once in a while."""
        try:
            return list(getattr(self._manager.hook, f"lmcache_{hook}")(**arguments))
        except Exception as error:  # a plugin must not break the engine
            LOG.warn(f"plugin {hook}", f"a plugin failed in lmcache_{hook}: {error!r}")
            return []
