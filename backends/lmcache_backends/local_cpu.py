"""local_cpu: frames in this process's memory. Keeps the buffers it is given; nothing is copied."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from lmcache_core.backend import (
    Buffers,
    ChunkKey,
    EvictionPolicy,
    Options,
    Size,
    StorageBackend,
    Stored,
    Transfer,
    component,
    memory_bytes,
    nbytes_of,
)


class LocalCpuOptions(Options):
    """`capacity`: bytes of frames to keep. `eviction`: the policy's name."""

    capacity: Size
    eviction: str = "lru"

    def medium_bytes(self) -> int:
        """Of this host's memory."""
        return memory_bytes()


class LocalCpuBackend(StorageBackend):
    """A dictionary with a byte budget."""

    Options = LocalCpuOptions
    medium, locality = "memory", "process"
    in_memory = True

    def __init__(self, options: LocalCpuOptions) -> None:
        self._capacity = options.capacity
        self._frames: EvictionPolicy[Buffers] = component("eviction", options.eviction)()
        self._used = 0
        self._lock = threading.RLock()  # a forgotten load may be collected while it is held

    def __repr__(self) -> str:
        return f"<LocalCpuBackend: {self._used} of {self._capacity} bytes>"

    def contains(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        with self._lock:
            return [self._frames.get(key) is not None for key in keys]

    def get(self, keys: Sequence[ChunkKey], transfer: Transfer) -> Iterator[tuple[int, Buffers]]:
        for i, key in enumerate(keys):
            with self._lock:
                parts = self._frames.get(key)
            if parts is not None:
                yield i, parts
            del parts

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> int:
        stored = 0
        with self._lock:
            for key, parts in frames:
                if self._frames.get(key) is None:
                    nbytes = nbytes_of(parts)
                    if not self._make_room(nbytes, prefix, transfer):
                        break
                    self._frames.add(key, tuple(parts))
                    self._used += nbytes
                stored += 1
        return stored

    def delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        with self._lock:
            for key in keys:
                self._remove(key)

    def scan(self, transfer: Transfer) -> Iterator[Stored]:
        with self._lock:
            found = [(key, self._frames.get(key)) for key in self._frames]
        yield from (Stored(key, nbytes_of(parts)) for key, parts in found if parts is not None)

    def touch(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        with self._lock:
            self._frames.touch(keys)

    def close(self) -> None:
        with self._lock:
            for key in list(self._frames):
                self._remove(key)

    def _make_room(self, nbytes: int, prefix: Sequence[ChunkKey], transfer: Transfer) -> bool:
        """Evict until `nbytes` fit; False, with nothing more evicted than needed, if they can't."""
        if nbytes > self._capacity:
            return False
        keep: frozenset[ChunkKey] | None = None
        while self._used + nbytes > self._capacity:
            keep = frozenset(prefix) if keep is None else keep
            victim = self._frames.victim(keep)
            if victim is None:
                return False
            self._remove(victim)
            transfer.evicted.append(victim)
        return True

    def _remove(self, key: ChunkKey) -> None:
        parts = self._frames.remove(key)
        if parts is not None:
            self._used -= nbytes_of(parts)


def _size(parts: Buffers) -> int:
    return sum(part.nbytes for part in parts)
