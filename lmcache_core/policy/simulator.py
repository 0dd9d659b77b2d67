"""Simulator: a trace played through the real policies and the real index, without bytes.

What it counts is what `local_cpu` behind an engine counts, request by request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lmcache_core.kv.keys import ChunkKey
from lmcache_core.policy.eviction import EvictionPolicy, Hint
from lmcache_core.policy.index import Index


@dataclass
class Outcome:
    """What a store of `capacity` bytes did for a trace."""

    capacity: int
    requests: int = 0
    chunks: int = 0
    """That were asked for,"""
    hits: int = 0
    """and found: the stored prefix of each request."""
    written: int = 0
    """Bytes stored."""

    @property
    def hit_rate(self) -> float:
        """Of the chunks that were asked for, 0 to 1."""
        return self.hits / max(1, self.chunks)


class Simulator:
    """A store of frames of `chunk_bytes` bytes each, which holds none of them."""

    def __init__(self, capacity: int, policy: EvictionPolicy[bool], chunk_bytes: int = 1) -> None:
        self.outcome = Outcome(capacity)
        self._chunk_bytes = chunk_bytes
        self._index: Index[bool] = Index(capacity, policy)

    def request(self, sequence: Sequence[ChunkKey]) -> int:
        """A prompt: load what is stored, compute the rest and store it. Returns the hits."""
        index, outcome = self._index, self.outcome
        hits = next((n for n, key in enumerate(sequence) if key not in index), len(sequence))
        if hits:
            index.policy.used(sequence[:hits])
        self._store(sequence, hits)
        outcome.requests += 1
        outcome.chunks += len(sequence)
        outcome.hits += hits
        return hits

    def hint(self, sequence: Sequence[ChunkKey], hint: Hint) -> None:
        """What a caller tells after a request."""
        self._index.policy.hint(sequence, hint)

    def _store(self, sequence: Sequence[ChunkKey], hits: int) -> None:
        stored = 0
        for place in range(hits, len(sequence)):
            key = sequence[place]
            if key not in self._index:
                if not self._index.add(sequence, key, True, self._chunk_bytes, []):
                    break
                self.outcome.written += self._chunk_bytes
                stored = place + 1
        if stored:
            self._index.policy.touched(sequence[:stored])


def curve(
    sequences: Iterable[Sequence[ChunkKey]],
    capacities: Iterable[int],
    policy: Callable[[int], EvictionPolicy[bool]],
    chunk_bytes: int = 1,
) -> list[Outcome]:
    """What stores of these capacities, in bytes, would have done for a trace."""
    stores = [Simulator(capacity, policy(capacity), chunk_bytes) for capacity in capacities]
    for sequence in sequences:
        for store in stores:
            store.request(sequence)
    return [store.outcome for store in stores]
