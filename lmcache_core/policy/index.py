"""Index: what a store of bounded size holds, kept to its capacity by a policy."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Generic

from lmcache_core.kv.keys import ChunkKey
from lmcache_core.policy.eviction import EvictionPolicy, V


class Index(Generic[V]):
    """Values by key, of up to `capacity` bytes together. Not thread-safe."""

    def __init__(self, capacity: int, policy: EvictionPolicy[V]) -> None:
        self.capacity = capacity
        self.policy = policy
        self._last: tuple[Sequence[ChunkKey], int] = (), 0
        """The chunk that was added last."""

    def __repr__(self) -> str:
        return f"<Index: {self.policy.nbytes} of {self.capacity} bytes, {self.policy!r}>"

    def __contains__(self, key: object) -> bool:
        return key in self.policy

    def __len__(self) -> int:
        return len(self.policy)

    def add(
        self,
        sequence: Sequence[ChunkKey],
        key: ChunkKey,
        value: V,
        nbytes: int,
        evicted: list[bytes],
    ) -> bool:
        """Store a chunk of a sequence; False where there is no room for it beside the rest of
        that. What has to leave for it is added to `evicted`.

        A sequence that is larger than all the room gets what is free, and displaces nothing: the
        others would have left for nothing.
        """
        policy, free = self.policy, self.capacity - self.policy.nbytes
        if nbytes > free:
            if nbytes * len(sequence) > self.capacity:
                return False
            evicted += policy.victims(nbytes - free, sequence)
            if policy.nbytes + nbytes > self.capacity:
                return False
        policy.add(sequence, self._place(sequence, key), nbytes, value)
        return True

    def _place(self, sequence: Sequence[ChunkKey], key: ChunkKey) -> int:
        """Which chunk of the sequence a new one is: often the next, else the first not there."""
        before, last = self._last
        place = last + 1
        if before is not sequence or place >= len(sequence) or sequence[place] != key:
            place = bisect_left(sequence, True, key=lambda each: each not in self.policy)
            if place >= len(sequence) or sequence[place] != key:
                place = sequence.index(key)
        self._last = sequence, place
        return place
