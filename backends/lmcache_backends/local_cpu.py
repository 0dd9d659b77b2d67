"""local_cpu: frames in this process's memory. Keeps the buffers it is given; nothing is copied."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from lmcache_core.backend import (
    Buffers,
    ChunkKey,
    Index,
    Options,
    Size,
    StorageBackend,
    Stored,
    Tenants,
    Transfer,
    eviction_policy,
    memory_bytes,
    nbytes_of,
)


class LocalCpuOptions(Options):
    """`capacity`: bytes of frames to keep. `eviction`: the policy's name. `tenants`: whether they
    share the room as it comes, or each has a right to an equal part of it."""

    capacity: Size
    eviction: str = "auto"
    tenants: Tenants = "shared"

    def medium_bytes(self) -> int:
        """Of this host's memory."""
        return memory_bytes()


class LocalCpuBackend(StorageBackend):
    """A dictionary with a byte budget."""

    Options = LocalCpuOptions
    medium, locality = "memory", "process"
    in_memory = True

    def __init__(self, options: LocalCpuOptions) -> None:
        policy = eviction_policy(options.eviction, options.capacity, options.tenants)
        self._index: Index[Buffers] = Index(options.capacity, policy)
        self._lock = threading.RLock()  # a forgotten load may be collected while it is held

    def __repr__(self) -> str:
        return f"<LocalCpuBackend: {self._index!r}>"

    def contains(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        with self._lock:
            return [key in self._index for key in keys]

    def get(self, keys: Sequence[ChunkKey], transfer: Transfer) -> Iterator[tuple[int, Buffers]]:
        for i, key in enumerate(keys):
            with self._lock:
                parts = self._index.policy.get(key)
            if parts is not None:
                yield i, parts
            del parts

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> int:
        index, evicted = self._index, transfer.evicted
        stored = 0
        with self._lock:
            for key, parts in frames:
                nbytes = nbytes_of(parts)
                if key not in index and not index.add(prefix, key, tuple(parts), nbytes, evicted):
                    break
                stored += 1
        return stored

    def delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        with self._lock:
            for key in keys:
                self._index.policy.remove(key)

    def scan(self, transfer: Transfer) -> Iterator[Stored]:
        with self._lock:
            policy = self._index.policy
            found = [(key, policy.get(key) or ()) for key in policy]
        yield from (Stored(key, nbytes_of(parts)) for key, parts in found)

    def used(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        with self._lock:
            self._index.policy.used(keys)

    def touch(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        with self._lock:
            self._index.policy.touched(keys)

    def close(self) -> None:
        with self._lock:
            for key in list(self._index.policy):
                self._index.policy.remove(key)
