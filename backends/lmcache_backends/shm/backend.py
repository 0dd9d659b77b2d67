"""shm: a pool in shared memory. What one process of this host stores, all have at once, uncopied.

Each chunk has a slot, a row of the columns in `segment.py`. A slot's `state` is what counts:

    FREE      nobody's
    RESERVED  its owner fills its pages; no index leads here
    WHOLE     published by storing this one byte
    GONE      deleted, or given up by its owner; its pages go when nobody looks at them

A chunk is looked up without a lock. Everything else holds the file's mutex for microseconds, never
while bytes are copied. The index, the page map and the counts follow from the slots: a holder that
dies leaves the word DIRTY set, and the next one derives them anew.

A lease is one byte of the slot's line, written only by the member that reads: set under the mutex,
cleared when the last view dies, without it. Nobody frees the pages before. Members are alive while
the kernel holds their file lock, so what the dead left is taken back as soon as room is needed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, TypeVar

import numpy as np
from pydantic import Field

from lmcache_backends.shm.segment import (
    DIRECTORY,
    MEMBERS,
    PAGE,
    Segment,
    Word,
    path_of,
)
from lmcache_core.backend import (
    Buffers,
    ChunkKey,
    ConfigError,
    DeadlineExceeded,
    Options,
    Size,
    StorageBackend,
    StorageError,
    Stored,
    Transfer,
    file_system_bytes,
    nbytes_of,
    start_thread,
    unheld,
)

T = TypeVar("T")

FREE, RESERVED, WHOLE, GONE = range(4)
_OPEN_SECONDS = 10.0
_OLDEST = 1024
"""Slots that are sorted by last use at a time."""
_HASH = struct.Struct("2Q")
_BUCKET = struct.Struct("8I")
_KEY = 32
_NOBODY = bytes(MEMBERS)


class ShmOptions(Options):
    """`capacity`: bytes of frames, the same for all that share the pool. `pool`: its name; each
    user has pools of their own."""

    capacity: Size
    pool: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "default"

    def identity(self) -> str:
        """The pool's name."""
        return self.pool

    def made(self) -> bool:
        """Whether the pool is there."""
        return os.path.exists(path_of(self.pool))

    def bytes_for(self, frame: int) -> int:
        """Whole pages."""
        return frame + -frame % PAGE

    def medium_bytes(self) -> int:
        """Of the file system for shared memory."""
        return file_system_bytes(DIRECTORY)


class ShmBackend(StorageBackend):
    """This process's membership of a pool."""

    Options = ShmOptions
    medium, locality = "memory", "host"
    in_memory = True

    def __init__(self, options: ShmOptions) -> None:
        self._options = options
        self._pool = _Pool(options)
        self._joining = threading.Lock()

    def __repr__(self) -> str:
        state = "closed" if self._pool.closed else "open"
        return f"<ShmBackend: pool {self._options.pool!r}, {state}>"

    def contains(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        return self._pool.contains(keys)

    def get(self, keys: Sequence[ChunkKey], transfer: Transfer) -> Iterator[tuple[int, Buffers]]:
        return unheld(self._pool.lease(keys, transfer))

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> int:
        stored = 0
        for key, parts in frames:
            if not self._put(key, parts, prefix, transfer):
                break
            stored += 1
        return stored

    def _put(
        self, key: ChunkKey, parts: Buffers, prefix: Sequence[ChunkKey], transfer: Transfer
    ) -> bool:
        pool = self._pool
        slot = pool.room_of(parts)
        if slot:
            pool.fill_head(slot, parts[0])
            pool.publish(slot, key, transfer)
            return True
        if pool.contains([key])[0]:
            return True
        room = pool.reserve(nbytes_of(parts), 0, prefix, transfer)
        if room is None:
            return False
        slot, view = room
        _copy(parts, view)
        pool.publish(slot, key, transfer)
        return True

    def reserve(
        self, nbytes: int, prefix: Sequence[ChunkKey], transfer: Transfer
    ) -> memoryview | None:
        room = self._pool.reserve(nbytes, PAGE, prefix, transfer)
        return None if room is None else room[1]

    def delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        self._pool.delete(keys, transfer)

    def scan(self, transfer: Transfer) -> Iterator[Stored]:
        yield from self._pool.stored(transfer)

    def touch(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        self._pool.touch(keys)

    def ping(self, transfer: Transfer) -> None:
        """Join the pool anew where its file was deleted; else see that its lock can be had."""
        with self._joining:
            try:
                self._pool.ping(transfer)
            except DeadlineExceeded:
                raise
            except StorageError:
                if self._pool.closed:
                    raise
                lost, self._pool = self._pool, _Pool(self._options)
                lost.close()

    def close(self) -> None:
        self._pool.close()


class _View(weakref.ref[np.ndarray]):
    """Tells when the last view on a slot's bytes dies that came from one call."""

    __slots__ = ("slot",)
    slot: int


class _Leases:
    """The slots that this member's views keep.

    A view dies on any thread, in the middle of anything, and an interrupt (Ctrl-C) may be raised in
    whatever Python code runs then. So none does: the queue hears of it, in C, and a thread gives
    back what has no view left. Whoever needs the room now does the same.
    """

    def __init__(self, segment: Segment, member: int) -> None:
        self._segment = segment
        self._member = member
        self._views: dict[int, list[_View]] = {}
        self._ended: queue.SimpleQueue[_View | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = False
        with contextlib.suppress(RuntimeError):  # no thread can be had
            start_thread(self._run, "lmcache-shm-leases")

    def __repr__(self) -> str:
        return f"<_Leases: member {self._member}, {len(self._views)} slots>"

    def view(self, slot: int, begin: int, end: int) -> memoryview:
        """A view on these bytes of `data`, a lease on its slot until it dies; the pool's mutex is
        held. There is no lease without a view, whatever ends this call."""
        array = self._segment.data[begin:end]
        view = _View(array, self._ended.put)
        view.slot = slot
        with self._lock:
            self._views.setdefault(slot, []).append(view)
            self._segment.leases[slot, self._member] = 1
        return array.data

    def settle(self) -> None:
        """Give back what nobody looks at any more."""
        with self._lock:
            for slot in list(self._views):
                self._settle(slot)

    def close(self) -> None:
        """Close the segment when nobody looks at it any more."""
        self._closing = True
        self._ended.put(None)
        self.settle()
        self._depart()

    def _run(self) -> None:
        while not self._departed():
            ended = [self._ended.get()]
            while not self._ended.empty():
                ended.append(self._ended.get())
            with self._lock:
                for slot in {view.slot for view in ended if view}:
                    self._settle(slot)
            del ended
            self._depart()

    def _settle(self, slot: int) -> None:
        """Every step may be done twice: who does it may be interrupted."""
        views = [view for view in self._views.get(slot, ()) if view() is not None]
        if views:
            self._views[slot] = views
            return
        segment = self._segment
        if segment.usable:  # a forked child's views are its parent's to count
            if segment.state[slot] == RESERVED:  # given up: only its owner can
                segment.state[slot] = GONE
            segment.leases[slot, self._member] = 0
        self._views.pop(slot, None)

    def _departed(self) -> bool:
        return self._closing and not self._views

    def _depart(self) -> None:
        with self._lock:
            if self._departed():
                self._segment.close()


class _Pool:
    """One membership of one segment: index, allocator, eviction."""

    def __init__(self, options: ShmOptions) -> None:
        self._segment = Segment(options.pool, options.capacity)
        self._rooms: dict[int, int] = {}
        """Slots of rooms handed out, by where in `data` their payload begins."""
        self._base = _address(self._segment.data.data)
        self._aged: deque[tuple[int, int]] = deque()
        """The slots that were the oldest when last sorted, and their last use then. Of those that
        were not used since, the first is the oldest still, so not every eviction has to sort."""
        self.closed = False
        try:
            self._member = self._hold(Transfer(_OPEN_SECONDS), self._join, changing=True)
        except BaseException:
            self._segment.close()
            raise
        self._leases = _Leases(self._segment, self._member)

    def _join(self) -> int:
        for member in range(MEMBERS):
            if self._segment.join(member):
                self._bury(member)
                self._segment.members[member] = 1
                self._sweep()
                return member
        raise ConfigError(f"pool: {self._segment.path} has {MEMBERS} members already")

    def close(self) -> None:
        """Leave, as soon as nobody is within, or looks at what was read."""
        self.closed = True
        if not self._segment.held:  # else who has it leaves
            self._leases.close()

    def ping(self, transfer: Transfer) -> None:
        self._hold(transfer, lambda: None)

    @property
    def _words(self) -> np.ndarray:
        return self._segment.words

    def _hold(self, transfer: Transfer, work: Callable[[], T], *, changing: bool = False) -> T:
        """What `work` returns, done with the mutex and with all that is derived in order. An
        exception leaves a change to be mended by the next, like death."""
        try:
            with self._segment.mutex(transfer):
                if self.closed:
                    raise StorageError("closed")
                if self._words[Word.DIRTY]:
                    self._derive()
                self._words[Word.DIRTY] = changing
                done = work()
                self._words[Word.DIRTY] = 0
                return done
        finally:
            if self.closed:
                self.close()

    # Index

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Without a lock: a slot that changes hands meanwhile is a wrong guess that `lease`, which
        looks again under the mutex, finds out."""
        self._check()
        found = self._find(keys) > 0
        if self._words[Word.DIRTY] and not found.all():
            try:
                self.ping(Transfer(0.0))  # if nobody holds the mutex, its last holder died
            except DeadlineExceeded:
                return list(map(bool, found))
            found = self._find(keys) > 0
        return list(map(bool, found))

    def _check(self) -> None:
        if self.closed:
            raise StorageError("closed")
        self._segment.check()

    def _find(self, keys: Sequence[ChunkKey]) -> np.ndarray:
        """For each key its slot, or 0."""
        if not keys:
            return np.zeros(0, np.int64)
        segment = self._segment
        wanted = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 4)
        cells = segment.index[self._buckets(wanted[:, 2:])].reshape(len(keys), -1)
        same = (segment.keys[cells] == wanted[:, None, :]).all(axis=2)
        same &= segment.state[cells] == WHOLE
        slots: np.ndarray = np.where(same, cells, 0).max(axis=1).astype(np.int64)
        return slots

    def _buckets(self, hashes: np.ndarray) -> np.ndarray:
        """Two for each key: a key ends with 16 bytes of a cryptographic hash. With two to choose
        from, and fewer than two slots to a bucket, its 8 cells do not run out in practice."""
        buckets: np.ndarray = hashes & np.uint64(len(self._segment.index) - 1)
        return buckets

    def _slot(self, key: ChunkKey) -> int:
        """What `_find` says of one key, for a tenth of its cost."""
        state = self._segment.state
        for _, cells in self._cells(key):
            for slot in cells:
                if slot and self._key(slot) == key and state[slot] == WHOLE:
                    return slot
        return 0

    def _cells(self, key: bytes) -> list[tuple[int, tuple[int, ...]]]:
        """The two buckets of a key, and the slots in each."""
        memory, base = self._segment.memory, self._segment.at["index"]
        buckets = [number & len(self._segment.index) - 1 for number in _HASH.unpack_from(key, 16)]
        return [(each, _BUCKET.unpack_from(memory, base + each * _BUCKET.size)) for each in buckets]

    def _key(self, slot: int) -> bytes:
        at = self._segment.at["keys"] + slot * _KEY
        return self._segment.memory[at : at + _KEY]

    def _enter(self, slot: int) -> bool:
        """Let the index lead to a slot: from its emptier bucket."""
        bucket, cells = max(self._cells(self._key(slot)), key=lambda each: each[1].count(0))
        if 0 not in cells:
            return False
        self._segment.index[bucket, cells.index(0)] = slot
        return True

    def _leave(self, slot: int) -> None:
        for bucket, cells in self._cells(self._key(slot)):
            if slot in cells:
                self._segment.index[bucket, cells.index(slot)] = 0

    def _derive(self) -> None:
        """Make everything that follows from the slots, after a holder died."""
        segment = self._segment
        segment.index[:] = 0
        segment.taken[:] = 0
        live = np.flatnonzero(segment.state != FREE)
        for slot in live:
            first = segment.first[slot]
            segment.taken[first : first + segment.pages[slot]] = 1
            if segment.state[slot] == WHOLE and not self._enter(int(slot)):
                segment.state[slot] = GONE
        free = int((segment.taken == 0).sum())
        self._words[[Word.FREE, Word.LONGEST]] = free
        self._words[Word.CURSOR] = 0
        self._words[Word.LOW] = 1
        self._words[Word.HIGH] = live.max(initial=0) + 1

    # Reading

    def lease(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[tuple[int, Buffers]]:
        """(index into keys, frame) of those that are there, to be read for as long as one likes."""
        return self._hold(transfer, lambda: self._lease(keys))

    def _lease(self, keys: Sequence[ChunkKey]) -> list[tuple[int, Buffers]]:
        slots = self._find(keys)
        begins = self._segment.start[slots]
        ends = begins + self._segment.nbytes[slots]
        places = enumerate(zip(slots.tolist(), begins.tolist(), ends.tolist(), strict=True))
        view = self._leases.view
        return [(i, [view(*place).toreadonly()]) for i, place in places if place[0]]

    def stored(self, transfer: Transfer) -> list[Stored]:
        return self._hold(transfer, self._stored)

    def _stored(self) -> list[Stored]:
        segment = self._segment
        slots = np.flatnonzero(segment.state[: self._high] == WHOLE)
        return [Stored(ChunkKey(self._key(int(n))), int(segment.nbytes[n])) for n in slots]

    def touch(self, keys: Sequence[ChunkKey]) -> None:
        """Without a lock: a slot that changes hands meanwhile is a little too young."""
        self._check()
        slots = self._find(keys)
        now = time.monotonic_ns() - np.arange(len(slots))
        there = np.flatnonzero(slots)[::-1]  # a key named twice has its first, later time
        self._segment.used[slots[there]] = now[there]

    # Writing

    def reserve(
        self,
        nbytes: int,
        head: int,
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> tuple[int, memoryview] | None:
        """A slot and its writable pages, for as long as the view lives or until it is published;
        None where there is no room. `head` bytes before the view are the slot's too."""
        pages = max(1, -(-(head + nbytes) // PAGE))
        if pages > self._words[Word.PAGES]:
            return None
        step = 1 << max(0, pages.bit_length() - 5)  # near sizes fit into each other's place
        pages = min(-(-pages // step) * step, int(self._words[Word.PAGES]))
        room = partial(self._reserve, pages, nbytes, head, prefix, transfer.evicted)
        return self._hold(transfer, room, changing=True)

    def _reserve(
        self, pages: int, nbytes: int, head: int, prefix: Sequence[ChunkKey], evicted: list[bytes]
    ) -> tuple[int, memoryview] | None:
        first = self._run(pages)
        if first is None:
            first = self._make_room(pages, prefix, evicted)
        slot = self._free_slot(prefix, evicted)
        if first is None or slot is None:
            return None
        begin = first * PAGE + head
        view = self._leases.view(slot, begin, begin + nbytes)
        self._occupy(slot, first, pages)
        self._segment.start[slot] = begin
        self._segment.nbytes[slot] = nbytes
        if head:
            self._rooms[begin] = slot
        return slot, view

    def _occupy(self, slot: int, first: int, pages: int) -> None:
        segment = self._segment
        segment.first[slot] = first
        segment.pages[slot] = pages
        segment.owner[slot] = self._member
        segment.state[slot] = RESERVED
        segment.taken[first : first + pages] = 1
        self._words[Word.FREE] -= pages
        self._words[Word.CURSOR] = first + pages
        self._words[Word.LOW] = slot + 1
        self._words[Word.HIGH] = max(self._high, slot + 1)

    def room_of(self, parts: Buffers) -> int:
        """The slot that the last part already lies in, with room for the first before it; or 0."""
        if len(parts) != 2 or parts[0].nbytes > PAGE or not parts[1].nbytes:
            return 0
        begin = _address(parts[1]) - self._base
        slot = self._rooms.pop(begin, 0)
        segment = self._segment
        ours = segment.state[slot] == RESERVED and segment.owner[slot] == self._member
        same = (segment.start[slot], segment.nbytes[slot]) == (begin, parts[1].nbytes)
        return slot if ours and same else 0

    def fill_head(self, slot: int, head: memoryview) -> None:
        """Put a head before the payload that lies in a reserved slot."""
        segment = self._segment
        begin = int(segment.start[slot]) - head.nbytes
        segment.data[begin : begin + head.nbytes] = np.frombuffer(head, np.uint8)
        segment.start[slot] = begin
        segment.nbytes[slot] += head.nbytes

    def publish(self, slot: int, key: ChunkKey, transfer: Transfer) -> None:
        """Show a filled slot, unless another process was faster."""
        self._hold(transfer, lambda: self._publish(slot, key), changing=True)

    def _publish(self, slot: int, key: ChunkKey) -> None:
        segment = self._segment
        if self._slot(key):
            return
        at = segment.at["keys"] + slot * _KEY
        segment.memory[at : at + _KEY] = key
        segment.used[slot] = time.monotonic_ns()
        segment.state[slot] = WHOLE
        if not self._enter(slot):
            segment.state[slot] = GONE

    def delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        self._hold(transfer, lambda: self._delete(keys), changing=True)

    def _delete(self, keys: Sequence[ChunkKey]) -> None:
        self._leases.settle()
        for slot in {int(slot) for slot in self._find(keys) if slot}:
            self._remove(slot)
        self._sweep()

    # Room

    @property
    def _high(self) -> int:
        return int(self._words[Word.HIGH])

    def _run(self, pages: int) -> int | None:
        """The first page of a free run of that length."""
        words, memory, base = self._words, self._segment.memory, self._segment.at["taken"]
        if pages > words[Word.FREE] or pages > words[Word.LONGEST]:
            return None
        end = base + int(words[Word.PAGES])
        for begin in (base + int(words[Word.CURSOR]), base):
            found = memory.find(bytes(pages), begin, end)
            if found >= 0:
                return found - base
        words[Word.LONGEST] = pages - 1
        return None

    def _free_slot(self, prefix: Sequence[ChunkKey], evicted: list[bytes]) -> int | None:
        slot = self._unused_slot()
        if slot is None and len(prefix) < self._words[Word.SLOTS]:
            self._leases.settle()
            oldest = self._oldest(prefix)
            if oldest:
                self._evict(oldest, evicted)
            slot = self._unused_slot()
        return slot

    def _unused_slot(self) -> int | None:
        words, base = self._words, self._segment.at["state"]
        end = base + int(words[Word.SLOTS])
        found = self._segment.memory.find(b"\0", base + int(words[Word.LOW]), end)
        words[Word.LOW] = words[Word.SLOTS] if found < 0 else found - base
        return None if found < 0 else found - base

    def _make_room(
        self, pages: int, prefix: Sequence[ChunkKey], evicted: list[bytes]
    ) -> int | None:
        """Free the least recently used until a run of `pages` is free; returns its first page."""
        self._reap()
        first = self._run(pages)
        if first is not None:
            return first
        if pages * len(prefix) > self._words[Word.PAGES]:  # it would not be there as a whole
            return None
        segment = self._segment
        oldest = self._oldest(prefix)
        if oldest and segment.pages[oldest] >= pages:
            return self._evict(oldest, evicted)[0]
        victims = self._victims(prefix)
        if segment.pages[victims].sum() + self._words[Word.FREE] < pages:
            return None
        freed = 0
        for victim in victims:
            if freed >= 2 * pages:  # scattered: look for neighbours instead
                break
            freed += int(segment.pages[victim])
            first, length = self._evict(int(victim), evicted)
            if length >= pages:
                return first
        for victim in self._window(pages, self._victims(prefix)):
            self._evict(int(victim), evicted)
        return self._run(pages)

    def _oldest(self, prefix: Sequence[ChunkKey]) -> int:
        """The least recently used slot that may be evicted, or 0."""
        segment = self._segment
        for sort in (False, True):
            if sort:
                slots = self._victims(prefix)[:_OLDEST]
                self._aged.extend(zip(slots.tolist(), segment.used[slots].tolist(), strict=True))
            while self._aged:
                slot, used = self._aged.popleft()
                unused = segment.state[slot] == WHOLE and segment.used[slot] == used
                if unused and not self._leased(slot) and self._key(slot) not in prefix:
                    return slot
        return 0

    def _victims(self, prefix: Sequence[ChunkKey]) -> np.ndarray:
        """Slots that may be evicted, least recently used first."""
        segment, high = self._segment, self._high
        may = segment.state[:high] == WHOLE
        may &= ~segment.leases[:high].view(np.uint64).any(axis=1)
        may[self._find(prefix)] = False
        slots = np.flatnonzero(may)
        return slots[np.argsort(segment.used[slots], kind="stable")]

    def _window(self, pages: int, victims: np.ndarray) -> np.ndarray:
        """The neighbours, among `victims`, that make room at the least cost in recent use."""
        segment = self._segment
        live = np.flatnonzero(segment.state[: self._high] != FREE)
        live = live[np.argsort(segment.first[live])]
        begins = segment.first[live]
        starts = np.concatenate([[0], begins + segment.pages[live]])
        upto = np.searchsorted(begins, starts + pages)
        cost = np.zeros(self._high)
        cost[victims] = np.arange(1, len(victims) + 1)
        blocked = np.concatenate([[0], np.cumsum(cost[live] == 0)])
        price = np.concatenate([[0], np.cumsum(cost[live])])
        here = np.arange(len(starts))
        prices = np.where(blocked[upto] == blocked[here], price[upto] - price[here], np.inf)
        prices[starts + pages > self._words[Word.PAGES]] = np.inf
        best = int(np.argmin(prices))
        return live[best : upto[best]] if np.isfinite(prices[best]) else live[:0]

    def _evict(self, slot: int, evicted: list[bytes]) -> tuple[int, int]:
        evicted.append(ChunkKey(self._key(slot)))
        return self._remove(slot)

    def _remove(self, slot: int) -> tuple[int, int]:
        """Hide a chunk, and free its pages unless somebody looks at them."""
        segment = self._segment
        segment.state[slot] = GONE
        self._leave(slot)
        return (0, 0) if self._leased(slot) else self._free(slot)

    def _free(self, slot: int) -> tuple[int, int]:
        """Returns the run of free pages, first and length, that this makes."""
        segment, words = self._segment, self._words
        segment.state[slot] = FREE
        first, pages = int(segment.first[slot]), int(segment.pages[slot])
        segment.taken[first : first + pages] = 0
        base = segment.at["taken"]
        end = base + int(words[Word.PAGES])
        begin = segment.memory.rfind(b"\1", base, base + first) + 1 or base
        after = segment.memory.find(b"\1", base + first + pages, end)
        length = (end if after < 0 else after) - begin
        words[Word.FREE] += pages
        words[Word.LONGEST] = max(int(words[Word.LONGEST]), length)
        words[Word.LOW] = min(int(words[Word.LOW]), slot)
        return begin - base, length

    def _leased(self, slot: int) -> bool:
        """Whether anybody looks at its pages."""
        at = self._segment.at["leases"] + slot * MEMBERS
        return self._segment.memory[at : at + MEMBERS] != _NOBODY

    def _reap(self) -> None:
        """Take back what dead members held, and what of ours nobody looks at."""
        self._leases.settle()
        for member in np.flatnonzero(self._segment.members):
            if member != self._member and not self._segment.lives(int(member)):
                self._bury(int(member))
        self._sweep()

    def _bury(self, member: int) -> None:
        segment, high = self._segment, self._high
        segment.leases[:high, member] = 0
        state, owner = segment.state[:high], segment.owner[:high]
        state[(state == RESERVED) & (owner == member)] = GONE
        segment.members[member] = 0

    def _sweep(self) -> None:
        for slot in np.flatnonzero(self._segment.state[: self._high] == GONE):
            if not self._leased(int(slot)):
                self._free(int(slot))


def _copy(parts: Buffers, target: memoryview) -> None:
    """Parts one behind the other. numpy lets other threads run meanwhile."""
    out = np.frombuffer(target, np.uint8) if target.nbytes else np.empty(0, np.uint8)
    done = 0
    for part in parts:
        if part.nbytes:
            out[done : done + part.nbytes] = np.frombuffer(part, np.uint8)
            done += part.nbytes


def _address(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])
