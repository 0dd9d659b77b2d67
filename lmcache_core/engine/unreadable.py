"""Unreadable: what lies in a store and is absent for who cannot read it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

from lmcache_core.kv.keys import ChunkKey

MAX_KEYS = 65536
FORGET_SECONDS = 600.0
"""Then it is looked at again: another process may have stored it anew."""


class Unreadable:
    """Keys whose frames turned out unreadable here (another encryption key, a removed serde, a
    newer version, damage): found by no lookup, and replaced by the next store. Thread-safe."""

    def __init__(self) -> None:
        self._since: dict[ChunkKey, float] = {}
        """When each was found out, the oldest first."""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Unreadable({len(self._since)} keys)"

    def add(self, keys: Iterable[ChunkKey]) -> None:
        """Note frames that cannot be read."""
        now = time.monotonic()
        with self._lock:
            for key in keys:
                self._since.pop(key, None)
                self._since[key] = now
            while len(self._since) > MAX_KEYS:
                del self._since[next(iter(self._since))]

    def discard(self, keys: Iterable[ChunkKey]) -> None:
        """Forget keys whose frames were removed, or read after all."""
        if not self._since:
            return
        with self._lock:
            for key in keys:
                self._since.pop(key, None)

    def among(self, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        """Which of `keys` are unreadable."""
        if not self._since:
            return []
        with self._lock:
            oldest = time.monotonic() - FORGET_SECONDS
            return [key for key in keys if self._since.get(key, oldest) > oldest]

    def hide(self, keys: Sequence[ChunkKey], found: Sequence[bool]) -> list[bool]:
        """What a store says of `keys`, without those."""
        hidden = set(self.among(keys))
        return [there and key not in hidden for key, there in zip(keys, found, strict=True)]
