"""Hit: what a lookup found."""

from __future__ import annotations

from typing import NamedTuple

from lmcache_core.kv.keys import ChunkKey


class Hit(NamedTuple):
    """What a lookup found."""

    keys: tuple[ChunkKey, ...]
    """The sequence that was asked for, root first."""
    tiers: tuple[int, ...]
    """For each chunk of the longest stored prefix, the number of the fastest tier that has it."""

    @property
    def chunks(self) -> int:
        """Length of that prefix in chunks."""
        return len(self.tiers)

    def first(self, chunks: int) -> Hit:
        """The hit on the first `chunks` chunks of the sequence."""
        return Hit(self.keys[:chunks], self.tiers[:chunks])


class TierInfo(NamedTuple):
    """A tier, for those who look at a Hit."""

    name: str
    backend: str
    in_memory: bool
    """Whether loading from it takes no longer than copying memory."""
    medium: str = "server"
    """What the bytes lie in: "memory", "disk", "server" or "object store"."""
