"""Shares: room divided among tenants, so that none can crowd out the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lmcache_core.kv.keys import ChunkKey
from lmcache_core.policy.eviction import EvictionPolicy, Hint, V

_SLACK = 256
"""Who holds most is looked up again when he has lost 1/_SLACK of the capacity."""


class Shares(EvictionPolicy[V]):
    """Each namespace has a policy of its own, and the one that holds most bytes gives first.

    So all that want more than an equal share get the same, and what others leave is theirs, too.
    """

    def __init__(self, capacity: int, make: Callable[[int], EvictionPolicy[V]]) -> None:
        self._make = make
        self._capacity = capacity
        self._policies: dict[bytes, EvictionPolicy[V]] = {}
        self._nbytes = 0
        self._largest: EvictionPolicy[V] | None = None
        self._until = 0
        """With so few bytes left the largest may not be that any more."""

    def __repr__(self) -> str:
        return f"<Shares of {len(self._policies)} tenants: {self._nbytes} bytes>"

    def add(self, sequence: Sequence[ChunkKey], index: int, nbytes: int, value: V) -> None:
        tenant = sequence[index].namespace
        policy = self._policies.get(tenant)
        if policy is None:
            policy = self._policies[tenant] = self._make(self._capacity)
        policy.add(sequence, index, nbytes, value)
        self._nbytes += nbytes
        if self._largest is None or policy.nbytes > self._largest.nbytes:
            self._largest = policy

    def used(self, prefix: Sequence[ChunkKey]) -> None:
        if policy := self._of(prefix):
            policy.used(prefix)

    def touched(self, sequence: Sequence[ChunkKey]) -> None:
        if policy := self._of(sequence):
            policy.touched(sequence)

    def remove(self, key: ChunkKey) -> None:
        if policy := self._of([key]):
            before = policy.nbytes
            policy.remove(key)
            self._nbytes -= before - policy.nbytes

    def victims(self, nbytes: int, keep: Sequence[ChunkKey]) -> list[ChunkKey]:
        out: list[ChunkKey] = []
        for policy in self._largest_first():
            before = policy.nbytes
            out += policy.victims(nbytes, keep)
            freed = before - policy.nbytes
            self._nbytes -= freed
            nbytes -= freed
            if nbytes <= 0:
                break
        return out

    def hint(self, prefix: Sequence[ChunkKey], hint: Hint) -> None:
        if policy := self._of(prefix):
            policy.hint(prefix, hint)

    def get(self, key: ChunkKey) -> V | None:
        policy = self._policies.get(key.namespace)
        return None if policy is None else policy.get(key)

    def __iter__(self) -> Iterator[ChunkKey]:
        return (key for policy in self._policies.values() for key in policy)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __contains__(self, key: object) -> bool:
        return isinstance(key, ChunkKey) and key in self._policies.get(key.namespace, ())

    def __len__(self) -> int:
        return sum(map(len, self._policies.values()))

    def _of(self, sequence: Sequence[ChunkKey]) -> EvictionPolicy[V] | None:
        return self._policies.get(sequence[0].namespace) if sequence else None

    def _largest_first(self) -> Iterator[EvictionPolicy[V]]:
        """Who holds most, nearly; and then, where he has nothing to give, the others."""
        if self._largest is not None and self._largest.nbytes > self._until:
            yield self._largest
        self._policies = {tenant: each for tenant, each in self._policies.items() if len(each)}
        order = sorted(self._policies.values(), key=_nbytes, reverse=True)
        for policy in order:
            self._largest = order[0]
            self._until = order[0].nbytes - self._capacity // _SLACK
            yield policy


def _nbytes(policy: EvictionPolicy[V]) -> int:
    return policy.nbytes
