"""Which chunks leave first when a bounded store is full.

A chunk without its parent is dead weight. Every use of a sequence touches it leaf first and root
last, so in plain least-recently-used order a leaf always stands before its root and no tree has to
be kept. (vLLM frees the blocks of a request in the same order.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from typing import Generic, TypeVar

from lmcache_core.kv.keys import ChunkKey

V = TypeVar("V")


class EvictionPolicy(ABC, Generic[V]):
    """An ordered map from keys to whatever a store keeps for them. Not thread-safe."""

    @abstractmethod
    def add(self, key: ChunkKey, value: V) -> None:
        """A new key, just used."""

    @abstractmethod
    def get(self, key: ChunkKey) -> V | None:
        """The value, with no effect on the order."""

    @abstractmethod
    def remove(self, key: ChunkKey) -> V | None:
        """Forget a key; None where it is unknown."""

    @abstractmethod
    def touch(self, chain: Sequence[ChunkKey]) -> None:
        """The sequence `chain` (root first) was used; unknown keys are passed over."""

    @abstractmethod
    def victim(self, keep: Collection[ChunkKey]) -> ChunkKey | None:
        """The key to evict next, or None where all that is left is in `keep`."""

    @abstractmethod
    def __iter__(self) -> Iterator[ChunkKey]:
        """All keys, the first to evict first."""


class LRU(EvictionPolicy[V]):
    """Least recently used, leaves before roots."""

    def __init__(self) -> None:
        self._values: OrderedDict[ChunkKey, V] = OrderedDict()

    def add(self, key: ChunkKey, value: V) -> None:
        self._values[key] = value

    def get(self, key: ChunkKey) -> V | None:
        return self._values.get(key)

    def remove(self, key: ChunkKey) -> V | None:
        return self._values.pop(key, None)

    def touch(self, chain: Sequence[ChunkKey]) -> None:
        for key in reversed(chain):
            if key in self._values:
                self._values.move_to_end(key)

    def victim(self, keep: Collection[ChunkKey]) -> ChunkKey | None:
        return next((key for key in self._values if key not in keep), None)

    def __iter__(self) -> Iterator[ChunkKey]:
        return iter(self._values)
