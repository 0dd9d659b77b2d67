"""Lists: chunks in several lists by last use, of which the head with the lowest score leaves next.

    list n     oldest <-> ... <-> youngest      a ring through the sentinel, slot n
    score      (rank of a chunk's list and age, time of its last use): the lower leaves first

Leaves leave before their roots without a tree, because three things hold for a parent and its
child: the parent's last use is not earlier; in one list the child stands nearer to the old end; and
the parent's list ranks as high at every age. The owner of the lists sees to the third, and `age`,
which falls, to the rest of the order.

Everything is a column, not an object a chunk: 50 bytes, and nothing for the garbage collector.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Generic

from lmcache_core.kv.keys import ChunkKey
from lmcache_core.policy.eviction import V

AGES = 56
"""Age buckets, two an octave of uses: the last begins at 90 million."""
_TIME_BITS = 64
_NONE = 1 << 2 * _TIME_BITS
"""Above all scores and times."""
_SEARCH = -1
"""Below all scores: the heads are to be compared."""

_SEVERAL = 0xFFFF


def _mark(key: ChunkKey) -> int:
    return 1 + (key[-4] << 7 | key[-3] >> 1)


def age_bucket(age: int) -> int:
    """The bucket of an age in uses: about twice its logarithm to base 2."""
    return min((age * age).bit_length(), AGES - 1) if age > 0 else 0


class Lists(Generic[V]):
    """Chunks of a store in `count` lists. A slot is a chunk's number while it is here."""

    def __init__(self, count: int) -> None:
        self.slots: dict[ChunkKey, int] = {}
        self.now = 0
        """Uses of chunks so far: the clock. It stands still while nothing happens."""
        self.at = array("q", [0] * count)
        """When a chunk was last used."""
        self.total = 0
        """Bytes of all chunks."""
        self.list = array("B", range(count))
        self.nbytes = array("I", [0] * count)
        """A frame has less than 4 GiB."""
        self.state = array("B", [0] * count)
        """For the owner of the lists: one byte a chunk."""
        self._count = count
        self._key: list[ChunkKey | None] = [None] * count
        self._value: list[V | None] = [None] * count
        self._depth = array("I", [0] * count)
        self._child = array("H", [0] * count)
        """0, two bytes of the only child's key that there ever was, or _SEVERAL."""
        self._older = array("i", range(count))
        self._younger = array("i", range(count))
        self._free: list[int] = []
        self._ranks: list[list[int]] = [[0] * AGES for _ in range(count)]
        self._ranked_at = 0
        self._lowest = 0
        self._second = _SEARCH
        self._keep: Sequence[ChunkKey] | None = None
        """The sequence that some heads were kept for when all were compared, and"""
        self._bound = _NONE
        """the time from which on others are hidden by them."""

    def get(self, key: ChunkKey) -> V | None:
        slot = self.slots.get(key)
        return None if slot is None else self._value[slot]

    def add(
        self, sequence: Sequence[ChunkKey], depth: int, nbytes: int, value: V, parent: int
    ) -> int:
        """A slot for a new chunk, which stands in no list yet. `parent`: its parent's, or 0."""
        key = sequence[depth]
        if self._free:
            slot = self._free.pop()
            self._key[slot], self._depth[slot], self.nbytes[slot] = key, depth, nbytes
            self._value[slot], self._child[slot] = value, 0
        else:
            slot = len(self._key)
            self._key.append(key)
            self._value.append(value)
            self._depth.append(depth)
            self.nbytes.append(nbytes)
            for column in (self.at, self.list, self.state, self._child, self._older, self._younger):
                column.append(0)
        self.slots[key] = slot
        self.total += nbytes
        if parent:
            mark = _mark(key)
            self._child[parent] = mark if self._child[parent] in (0, mark) else _SEVERAL
        return slot

    def append(self, slot: int, to: int) -> None:
        """Put a chunk at the young end of a list: it is used now."""
        self.at[slot] = self.now
        self._insert(slot, to, to)

    def move(self, slot: int, to: int) -> None:
        """Take a chunk to the young end of a list: it is used now."""
        olders, youngers = self._older, self._younger
        older, younger = olders[slot], youngers[slot]
        youngers[older], olders[younger] = younger, older
        older = olders[to]
        olders[slot], youngers[slot] = older, to
        youngers[older] = olders[to] = slot
        self.list[slot] = to
        self.at[slot] = self.now
        if older == to:
            self._lower(slot)

    def cool(self, sequence: Sequence[ChunkKey]) -> None:
        """Take a sequence to the old end of the lowest list, as if it had never been used: from its
        leaf up to the first chunk that other sequences go on from."""
        alone: list[int] = []
        child = 0
        for key in reversed(sequence):
            slot = self.slots.get(key)
            if slot is not None:
                if self._child[slot] not in (0, child):
                    break
                alone.append(slot)
            child = _mark(key)
        for slot in reversed(alone):
            self._take(slot)
            self.at[slot] = 0
            self._insert(slot, 0, self._younger[0])
        self._second = _SEARCH

    def follow(self, slot: int, parent: int, to: int) -> bool:
        """Put a chunk where it leaves just before its parent; False where the parent was used so
        long ago that finding the place would take more steps than the parent has ancestors."""
        at = self.at[parent]
        behind = parent
        if self.list[parent] != to:
            behind, steps = to, self._depth[parent] + 32
            while (before := self._older[behind]) != to and self.at[before] > at:
                behind = before
                steps -= 1
                if not steps:
                    return False
        self.at[slot] = at
        self._insert(slot, to, behind)
        return True

    def remove(self, slot: int) -> ChunkKey:
        """Take a chunk out of its list and forget it."""
        self._take(slot)
        key = self._key[slot]
        assert key is not None
        del self.slots[key]
        self.total -= self.nbytes[slot]
        self._key[slot] = self._value[slot] = None
        self._free.append(slot)
        return key

    def rank(self, ranks: list[list[int]]) -> None:
        """Score all by their age as it is now, and by these ranks for each list and age bucket,
        which fall with age."""
        self._ranks = ranks
        self._ranked_at = self.now
        self._second = _SEARCH

    def next(self, keep: Sequence[ChunkKey]) -> int:
        """The slot of the chunk to leave next; 0 where only chunks of `keep` are left.

        As long as the head of the lowest list is no higher than the other heads were when all were
        last compared, they need not be: each list's head only grows younger.
        """
        number = self._lowest
        slot = self._younger[number]
        if slot >= self._count and (self._keep is None or self._keep is keep):
            at = self.at[slot]
            age = self._ranked_at - at
            bucket = min((age * age).bit_length(), AGES - 1) if age > 0 else 0
            if self._ranks[number][bucket] << _TIME_BITS | at <= self._second and at < self._bound:
                depth = self._depth[slot]
                if depth >= len(keep) or keep[depth] != self._key[slot]:
                    return slot
        return self._search(keep)

    def _search(self, keep: Sequence[ChunkKey]) -> int:
        """Compare all heads. One that is to be kept hides all that is younger, for its leaf may
        stand behind the kept one; where this hides everything, look behind the kept ones."""
        count, younger, times = self._count, self._younger, self.at
        bound, heads = _NONE, []
        for number in range(count):
            slot = younger[number]
            if slot >= count:
                at = times[slot]
                if self._kept(slot, keep):
                    bound = min(bound, at)
                else:
                    bucket = age_bucket(self._ranked_at - at)
                    heads.append((self._ranks[number][bucket] << _TIME_BITS | at, number, at))
        self._keep, self._bound = (None if bound == _NONE else keep), bound
        if bound != _NONE:
            heads = [head for head in heads if head[2] < bound]
        if not heads:
            self._second = _SEARCH
            return self._behind(keep)
        heads.sort()
        lowest = self._lowest = heads[0][1]
        second, number, _ = heads[1] if len(heads) > 1 else (_NONE, count, 0)
        self._second = second - (number < lowest)
        return younger[lowest]

    def _behind(self, keep: Sequence[ChunkKey]) -> int:
        first = [slot for n in range(self._count) if (slot := self._first(n, keep))]
        return min(first, key=self._score, default=0)

    def _first(self, number: int, keep: Sequence[ChunkKey]) -> int:
        slot = self._younger[number]
        while slot != number and self._kept(slot, keep):
            slot = self._younger[slot]
        return 0 if slot == number else slot

    def _score(self, slot: int) -> int:
        at = self.at[slot]
        rank = self._ranks[self.list[slot]][age_bucket(self._ranked_at - at)]
        return rank << _TIME_BITS | at

    def _kept(self, slot: int, keep: Sequence[ChunkKey]) -> bool:
        depth = self._depth[slot]  # a key has one place in all sequences
        return depth < len(keep) and keep[depth] == self._key[slot]

    def _take(self, slot: int) -> None:
        older, younger = self._older[slot], self._younger[slot]
        self._younger[older], self._older[younger] = younger, older

    def _insert(self, slot: int, to: int, behind: int) -> None:
        """Put a chunk into a list on the old side of another, or of its sentinel."""
        older = self._older[behind]
        self._older[slot], self._younger[slot] = older, behind
        self._younger[older] = self._older[behind] = slot
        self.list[slot] = to
        if older == to:
            self._lower(slot)

    def _lower(self, slot: int) -> None:
        """A list has a head that was not there when all were compared."""
        self._second = min(self._second, self._score(slot) - 1)
