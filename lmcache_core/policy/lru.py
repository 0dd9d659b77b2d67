"""lru: least recently used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmcache_core.kv.keys import ChunkKey
from lmcache_core.policy.eviction import EvictionPolicy, Hint, V
from lmcache_core.policy.lists import Lists


class LRU(EvictionPolicy[V]):
    """Least recently used, leaves before roots."""

    def __init__(self, capacity: int) -> None:
        self._lists: Lists[V] = Lists(1)

    def __repr__(self) -> str:
        return f"LRU({len(self)} chunks)"

    def add(self, sequence: Sequence[ChunkKey], index: int, nbytes: int, value: V) -> None:
        lists = self._lists
        lists.now += 1
        parent = lists.slots.get(sequence[index - 1], 0) if index else 0
        slot = lists.add(sequence, index, nbytes, value, parent)
        if parent:
            lists.follow(slot, parent, 0)
        else:
            lists.append(slot, 0)

    def used(self, prefix: Sequence[ChunkKey]) -> None:
        self.touched(prefix)

    def touched(self, sequence: Sequence[ChunkKey]) -> None:
        lists = self._lists
        lists.now += 1
        for key in reversed(sequence):
            slot = lists.slots.get(key)
            if slot is not None:
                lists.move(slot, 0)

    def remove(self, key: ChunkKey) -> None:
        slot = self._lists.slots.get(key)
        if slot is not None:
            self._lists.remove(slot)

    def victims(self, nbytes: int, keep: Sequence[ChunkKey]) -> list[ChunkKey]:
        lists, freed, out = self._lists, 0, []
        while freed < nbytes and (slot := lists.next(keep)):
            freed += lists.nbytes[slot]
            out.append(lists.remove(slot))
        return out

    def hint(self, prefix: Sequence[ChunkKey], hint: Hint) -> None:
        if hint == "waiting":
            self.touched(prefix)
        else:
            self._lists.cool(prefix)

    def get(self, key: ChunkKey) -> V | None:
        return self._lists.get(key)

    def __iter__(self) -> Iterator[ChunkKey]:
        return iter(self._lists.slots)

    @property
    def nbytes(self) -> int:
        return self._lists.total

    def __contains__(self, key: object) -> bool:
        return key in self._lists.slots

    def __len__(self) -> int:
        return len(self._lists.slots)
