"""EvictionPolicy: which chunks leave first when a bounded store is full.

A chunk without its parent is dead weight: nobody finds it. So in every policy leaves leave before
their roots. EvictionConformance in lmcache_core.testing checks this and the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, Literal, TypeVar

from lmcache_core.kv.keys import ChunkKey

V = TypeVar("V")

Hint = Literal["done", "waiting", "once"]
"""What a caller knows of a sequence: its chat is over, its chat waits for a tool and will go on,
or it is a batch job's and will not come again."""


class EvictionPolicy(ABC, Generic[V]):
    """The chunks of a store, with whatever it keeps for each, and the order in which they leave.

    One store owns it: not thread-safe. A *sequence* is a list of keys from the root on, and a
    *prefix* one that is in the store; keys that the policy does not know are passed over. No call
    costs more than its own keys: what else is stored does not matter.
    """

    def __init__(self, capacity: int) -> None:
        """Of a store of `capacity` bytes."""

    @abstractmethod
    def add(self, sequence: Sequence[ChunkKey], index: int, nbytes: int, value: V) -> None:
        """Chunk `index` of a sequence is new in the store, behind the chunks before it."""

    @abstractmethod
    def get(self, key: ChunkKey) -> V | None:
        """What the store keeps for a chunk; no use."""

    @abstractmethod
    def used(self, prefix: Sequence[ChunkKey]) -> None:
        """A load took these chunks: what they are kept for."""

    @abstractmethod
    def touched(self, sequence: Sequence[ChunkKey]) -> None:
        """A store passed along the chunks of a sequence that are there. They are in use now, but
        this is no second use: the request that stores a chunk has counted as its first."""

    @abstractmethod
    def remove(self, key: ChunkKey) -> None:
        """A chunk was deleted, not evicted."""

    @abstractmethod
    def victims(self, nbytes: int, keep: Sequence[ChunkKey]) -> list[ChunkKey]:
        """Take out chunks of at least `nbytes` bytes, none of the sequence `keep`; returns them,
        the first to leave first. Fewer bytes where nothing else is left."""

    def hint(self, prefix: Sequence[ChunkKey], hint: Hint) -> None:
        """The caller knows how this sequence goes on. May be wrong; a policy may ignore it."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the chunks in the store."""

    @abstractmethod
    def __iter__(self) -> Iterator[ChunkKey]:
        """The keys of all chunks in the store, in any order."""

    @abstractmethod
    def __contains__(self, key: object) -> bool:
        """Whether a chunk is in the store."""

    @abstractmethod
    def __len__(self) -> int:
        """Chunks in the store."""
