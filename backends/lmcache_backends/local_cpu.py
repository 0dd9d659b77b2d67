"""local_cpu: frames in this process's memory. Keeps the buffers it is given; nothing is copied."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from lmcache_core.backend import (
    Buffers,
    ChunkKey,
    Hint,
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

T = TypeVar("T")


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
    """A dictionary with a byte budget.

    A change may be left half done, by an interrupt (Ctrl-C) between any two lines; then all begins
    anew. And a touch may come in the middle of one, by a forgotten load that is collected there; it
    is passed over.
    """

    Options = LocalCpuOptions
    medium, locality = "memory", "process"
    in_memory = True

    def __init__(self, options: LocalCpuOptions) -> None:
        self._options = options
        self._lock = threading.RLock()  # a forgotten load may be collected while it is held
        self._changes = self._torn = False
        self._index = self._empty()

    def __repr__(self) -> str:
        return f"<LocalCpuBackend: {self._index!r}>"

    def _empty(self) -> Index[Buffers]:
        options = self._options
        policy = eviction_policy(options.eviction, options.capacity, options.tenants)
        return Index(options.capacity, policy)

    def _whole(self, transfer: Transfer) -> Index[Buffers]:
        """The index; the lock is held."""
        if self._torn and not self._changes:
            torn, self._index, self._torn = self._index, self._empty(), False
            with suppress(Exception):  # as far as it can still be read
                transfer.evicted += list(torn.policy)
        return self._index

    def _change(self, transfer: Transfer, work: Callable[[Index[Buffers]], T]) -> T | None:
        """What `work` makes of the index; None in the middle of another change."""
        with self._lock:
            if self._changes:
                return None
            index = self._whole(transfer)
            self._changes = self._torn = True
            try:
                done = work(index)
                self._torn = False
                return done
            finally:
                self._changes = False

    def contains(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        with self._lock:
            index = self._whole(transfer)
            return [key in index for key in keys]

    def get(self, keys: Sequence[ChunkKey], transfer: Transfer) -> Iterator[tuple[int, Buffers]]:
        for i, key in enumerate(keys):
            with self._lock:
                parts = self._whole(transfer).policy.get(key)
            if parts is not None:
                yield i, parts
            del parts

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> int:
        sized = [(key, tuple(parts), nbytes_of(parts)) for key, parts in frames]

        def add(index: Index[Buffers]) -> int:
            for stored, (key, parts, nbytes) in enumerate(sized):
                if key not in index and not index.add(prefix, key, parts, nbytes, transfer.evicted):
                    return stored
            return len(sized)

        return self._change(transfer, add) or 0

    def delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        self._change(transfer, lambda index: _remove(index, keys))

    def scan(self, transfer: Transfer) -> Iterator[Stored]:
        with self._lock:
            policy = self._whole(transfer).policy
            found = [(key, policy.get(key) or ()) for key in policy]
        yield from (Stored(key, nbytes_of(parts)) for key, parts in found)

    def used(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        self._change(transfer, lambda index: index.policy.used(keys))

    def touch(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        self._change(transfer, lambda index: index.policy.touched(keys))

    def hint(self, keys: Sequence[ChunkKey], hint: Hint, transfer: Transfer) -> None:
        with self._lock:
            self._index.policy.hint(keys, hint)

    def close(self) -> None:
        self._index = self._empty()


def _remove(index: Index[Buffers], keys: Sequence[ChunkKey]) -> None:
    for key in keys:
        index.policy.remove(key)
