"""auto: the chunk whose room is worth least leaves, as counted while the store runs.

    lists[uses 1, 2, 3, 4+][longest chat 1, 2, 3+ that a chunk was part of], each by last use

The head with the lowest index of hazards.py leaves. A parent has at least its child's uses, its
longest chat and its last use, and the index never falls with these: so a leaf leaves before its
root (see lists.py). Uses and chats of evicted chunks are remembered.

    turn    of a request: 1, or one more than that of the request that it goes on from, which is
            the one that used the last chunk it knows last and ended there
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from lmcache_core.kv.keys import ChunkKey
from lmcache_core.policy.eviction import EvictionPolicy, Hint, V
from lmcache_core.policy.hazards import Hazards
from lmcache_core.policy.lists import AGES, Lists
from lmcache_core.policy.memory import Memory

USES, CHATS = 4, 3
CLASSES = USES * CHATS
"""A class is CHATS * (uses - 1) + (chat - 1)."""
_LENGTHS = 8
"""Times the store's content for which evicted chunks are remembered."""
_EVERY = 3072
"""Uses between two tables of ranks, or a quarter of the store's content if that is more."""
_BEHIND = 0.0005
"""Part of all uses by which hits may lag behind LRU's before LRU rules."""

_CLIFF = 4
"""A store of twice the room would have this many times the hits: a scan goes round."""
_ADMIT = 32
"""Then one new sequence of so many takes the place of others; the rest are the first to leave."""

Mode = Literal["worth", "age", "sieve"]
"""By what chunks leave: worth, as counted; age, as LRU; or the last to come is the first to go."""

_JOIN = [
    [max(a // CHATS, b // CHATS) * CHATS + max(a % CHATS, b % CHATS) for b in range(CLASSES)]
    for a in range(CLASSES)
]
_MEET = [
    [min(a // CHATS, b // CHATS) * CHATS + min(a % CHATS, b % CHATS) for b in range(CLASSES)]
    for a in range(CLASSES)
]
_USED = [min(a + CHATS, a % CHATS + CLASSES - CHATS) for a in range(CLASSES)]
_ENDED = 64
"""In a chunk's state, beside its class and, above, its turn: the last request ended there."""


class Auto(EvictionPolicy[V]):
    """Lowest Gittins index of a head of a list by uses and chat; never much behind LRU."""

    def __init__(self, capacity: int) -> None:
        self._lists: Lists[V] = Lists(CLASSES)
        self._hazards = Hazards(CLASSES)
        self._memory = Memory(1, _LENGTHS)
        self._next_ranking = 0
        self._mode: Mode = "worth"
        self._sequences = 0

    def __repr__(self) -> str:
        return f"Auto({len(self)} chunks, by {self._mode})"

    def add(self, sequence: Sequence[ChunkKey], index: int, nbytes: int, value: V) -> None:
        lists, key = self._lists, sequence[index]
        lists.now += 1
        parent = lists.slots.get(sequence[index - 1], 0) if index else 0
        turn = lists.state[parent] >> 4 & 3 if parent else 1
        kind = turn - 1
        known = self._memory.recall(key)
        if known is not None:
            kind = known & 15
            turn = min(kind % CHATS + 2, CHATS) if known & _ENDED >> 2 else 1
            kind = _JOIN[_USED[kind]][turn - 1]
        slot = lists.add(sequence, index, nbytes, value, parent)
        lists.state[slot] = kind | turn << 4 | _ENDED
        if not parent:
            lists.append(slot, kind)
        elif not lists.follow(slot, parent, _MEET[kind][lists.list[parent]]):
            self.touched(sequence[:index])
            lists.follow(slot, parent, _MEET[kind][lists.list[parent]])
        if self._hazards.sampled(key):
            self._hazards.added()
            self._hazards.use(key, kind, lists.now, False)

    def used(self, prefix: Sequence[ChunkKey]) -> None:
        turn = self._turn(prefix, used=True)
        lists, hazards = self._lists, self._hazards
        lists.now += max(1, len(prefix))
        kind = turn - 1
        for key, slot, ended in self._leaf_first(prefix):
            kind = _JOIN[kind][_USED[lists.state[slot] & 15]]
            lists.state[slot] = kind | turn << 4 | ended
            lists.move(slot, kind)
            if hazards.sampled(key):
                hazards.use(key, kind, lists.now, True)

    def touched(self, sequence: Sequence[ChunkKey]) -> None:
        turn = self._turn(sequence, used=False)
        lists, hazards = self._lists, self._hazards
        lists.now += 1
        kind = turn - 1
        for key, slot, ended in self._leaf_first(sequence):
            kind = _JOIN[kind][lists.state[slot] & 15]
            lists.state[slot] = kind | turn << 4 | ended
            lists.move(slot, kind)
            if hazards.sampled(key):
                hazards.place(key, kind, lists.now)
        if self._mode == "sieve":
            self._sequences += 1
            if self._sequences % _ADMIT:
                lists.cool(sequence)

    def _turn(self, sequence: Sequence[ChunkKey], *, used: bool) -> int:
        """Of the request that passes along a sequence."""
        slots = self._lists.slots
        state = next((self._lists.state[slots[k]] for k in reversed(sequence) if k in slots), 0)
        turn = max(1, state >> 4 & 3)
        if used:
            turn = min(turn + 1, CHATS) if state & _ENDED else 1
        return turn

    def _leaf_first(self, sequence: Sequence[ChunkKey]) -> Iterator[tuple[ChunkKey, int, int]]:
        """Key, slot and whether a request of this sequence ends there (or nearly), of each chunk
        that is here."""
        slots, end = self._lists.slots, len(sequence) - 2
        for depth in range(len(sequence) - 1, -1, -1):
            key = sequence[depth]
            slot = slots.get(key)
            if slot is not None:
                yield key, slot, _ENDED if depth >= end else 0

    def remove(self, key: ChunkKey) -> None:
        slot = self._lists.slots.get(key)
        if slot is not None:
            self._lists.remove(slot)
            self._hazards.removed(key)

    def victims(self, nbytes: int, keep: Sequence[ChunkKey]) -> list[ChunkKey]:
        lists = self._lists
        if lists.now >= self._next_ranking:
            self._rank()
        freed, out = 0, []
        while freed < nbytes and (slot := lists.next(keep)):
            freed += lists.nbytes[slot]
            state = lists.state[slot]
            age = lists.now - lists.at[slot]
            key = lists.remove(slot)
            self._hazards.evicted(key, age)
            self._memory.remember(key, state & 15 | (state & _ENDED) >> 2)
            out.append(key)
        return out

    def hint(self, prefix: Sequence[ChunkKey], hint: Hint) -> None:
        if hint == "waiting":
            self.touched(prefix)
        else:
            self._lists.cool(prefix)

    def _rank(self) -> None:
        """Learn from what happened, and order what is here by it."""
        lists, hazards, length = self._lists, self._hazards, len(self)
        self._next_ranking = lists.now + max(_EVERY, length // 4)
        if length > 2 * self._memory.chunks:
            self._memory = Memory(length, _LENGTHS)
        self._mode = self._judge()
        index = hazards.index(lists.now, lists.slots).reshape(USES, CHATS, AGES)
        index = np.maximum.accumulate(np.maximum.accumulate(index, axis=0), axis=1)
        if self._mode == "age":
            index[:] = 0
        _, ranks = np.unique(index, return_inverse=True)
        lists.rank(ranks.reshape(CLASSES, AGES).tolist())

    def _judge(self) -> Mode:
        hazards = self._hazards
        if hazards.near_hits > _CLIFF * (hazards.lru_hits + 0.01 * hazards.uses):
            return "sieve"
        behind = hazards.lost - hazards.won
        doubt = 2.0 * ((hazards.lost + hazards.won) * hazards.unseen) ** 0.5
        return "age" if behind > _BEHIND * hazards.uses + doubt else "worth"

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
