"""WriteBehind: a bounded queue of chunks, readable while they wait, and its thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from lmcache_core.errors import DeadlineExceeded
from lmcache_core.io.threads import start_thread
from lmcache_core.kv.chunk import Chunk
from lmcache_core.kv.keys import ChunkKey
from lmcache_core.plugins.events import Reason
from lmcache_core.plugins.log import LOG

BATCH_BYTES = 64 << 20
"""About this much is handed to the store at a time."""
MAX_HOLES = 65536
MAX_TOUCHES = 1024
"""Beyond this many waiting jobs a touch is not worth its place."""

Write = Callable[[Sequence[Chunk], tuple[ChunkKey, ...]], int]
"""(chunks, their sequence) -> how many of them, from the first, the store now has."""
Drop = Callable[[Sequence[ChunkKey], Reason], None]
"""Hears (keys, reason) of chunks that were not stored."""


class _Job(NamedTuple):
    """One chunk of a sequence to store."""

    chunk: Chunk
    keys: tuple[ChunkKey, ...]


_Call = Callable[[], None]
"""What else the store is to be told."""


class WriteBehind:
    """Takes chunks up to `budget` bytes. Beyond that it refuses them or, if `block`, waits.

    A chunk that was refused or not stored leaves a hole: what follows it in a sequence could never
    be found, so it is refused too, until the missing chunk is offered again.
    """

    def __init__(self, write: Write, drop: Drop, budget: int, *, block: bool) -> None:
        self.pending: dict[ChunkKey, Chunk] = {}
        """Chunks taken and not yet stored. Reading it needs no lock."""
        self.holes: dict[ChunkKey, None] = {}
        """Chunks known to be missing in the store, the oldest first."""
        self._write, self._drop = write, drop
        self._budget, self._block = budget, block
        self._jobs: deque[_Job | _Call] = deque()
        self._bytes = 0
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # whose own `with` an interrupt may lock
        self._thread: threading.Thread | None = None
        self._busy = False
        self._refuses = self._closed = False

    def __repr__(self) -> str:
        return f"<WriteBehind: {len(self.pending)} chunks wait, {self._bytes} bytes>"

    def add(self, chunk: Chunk, keys: tuple[ChunkKey, ...]) -> Reason | None:
        """Queue a chunk of the sequence `keys`, or say why it is refused. Chunks of one sequence
        come with the same tuple: those that lie next to each other are written together. Raises
        RuntimeError where the thread cannot be had."""
        with self._lock:
            if self._behind_hole(keys, chunk.index):
                return Reason.HOLE
            if self._block:
                self._changed.wait_for(lambda: self._refuses or self._fits(chunk.nbytes))
            if self._refuses or not self._fits(chunk.nbytes):
                return Reason.QUEUE
            if chunk.key not in self.pending:
                self._append(_Job(chunk, keys))
                self.pending[chunk.key] = chunk
                self._bytes += chunk.nbytes
            self.holes.pop(chunk.key, None)
        return None

    def call(self, work: _Call) -> None:
        """Do something else with the store, after what was taken before; or not at all, where no
        thread can be had."""
        with self._lock, suppress(RuntimeError):
            if not self._refuses:
                self._append(work)

    def cancel(self, keys: Sequence[ChunkKey], timeout: float) -> set[ChunkKey]:
        """Forget chunks that wait to be written, and wait for those that are being written; which
        were forgotten. Raises DeadlineExceeded where a store takes longer for them."""
        with self._lock:
            mine = self.pending.keys() & set(keys)
            if not mine:
                return set()
            forgotten = {
                job.chunk.key
                for job in self._jobs
                if isinstance(job, _Job) and job.chunk.key in mine
            }
            self._jobs = deque(
                job
                for job in self._jobs
                if not (isinstance(job, _Job) and job.chunk.key in forgotten)
            )
            self._forget(forgotten)
            self._remember(list(forgotten))
            self._changed.notify_all()
            under_way = mine - forgotten
            if not self._changed.wait_for(lambda: under_way.isdisjoint(self.pending), timeout):
                raise DeadlineExceeded(f"still being written after {timeout:.3g} s")
            return forgotten

    def _forget(self, keys: Iterable[ChunkKey]) -> None:
        for key in keys:
            chunk = self.pending.pop(key, None)  # none is left once closed
            self._bytes -= 0 if chunk is None else chunk.nbytes

    @property
    def behind(self) -> bool:
        """Whether so much waits that a touch is not worth its place."""
        return len(self._jobs) >= MAX_TOUCHES

    def missing(self, keys: Sequence[ChunkKey]) -> None:
        """Note chunks that the store will not have."""
        with self._lock:
            self._remember(keys)

    def _behind_hole(self, keys: Sequence[ChunkKey], index: int) -> bool:
        return bool(self.holes) and any(key in self.holes for key in keys[:index])

    def _fits(self, nbytes: int) -> bool:
        return self._bytes + nbytes <= self._budget or not self.pending

    def _remember(self, keys: Sequence[ChunkKey]) -> None:
        self.holes.update(dict.fromkeys(keys))
        while len(self.holes) > MAX_HOLES:
            del self.holes[next(iter(self.holes))]

    def _append(self, job: _Job | _Call) -> None:
        if self._thread is None:
            self._thread = start_thread(self._run, "lmcache-writer")
        self._jobs.append(job)
        self._changed.notify_all()

    def _run(self) -> None:
        with self._lock:
            if self._thread not in (None, threading.current_thread()):
                return  # who started the other was interrupted
            self._thread = threading.current_thread()
        while (work := self._take()) is not None:
            try:
                work()
            except BaseException as error:  # the store's are counted: this is a listener's
                LOG.warn("writer", f"the thread that writes goes on after {error!r}")
            with self._lock:
                self._busy = False
                self._changed.notify_all()
            del work  # hold no chunk while idle

    def _take(self) -> _Call | None:
        with self._lock:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            self._busy = True
            first = self._jobs.popleft()
            return self._batch(first) if isinstance(first, _Job) else first

    def _batch(self, first: _Job) -> _Call:
        """Storing this and the next chunks of its sequence, about BATCH_BYTES of them."""
        chunks, nbytes = [first.chunk], first.chunk.nbytes
        while self._jobs:
            job = self._jobs[0]
            if not isinstance(job, _Job) or job.keys is not first.keys:
                break
            if nbytes + job.chunk.nbytes > BATCH_BYTES:
                break
            self._jobs.popleft()
            chunks.append(job.chunk)
            nbytes += job.chunk.nbytes
        return partial(self._store, chunks, first.keys)

    def _store(self, chunks: Sequence[Chunk], keys: tuple[ChunkKey, ...]) -> None:
        with self._lock:
            hole = self._behind_hole(keys, chunks[0].index)
        stored = 0
        try:
            if hole:
                self._drop([chunk.key for chunk in chunks], Reason.HOLE)
            else:
                stored = self._write(chunks, keys)
        finally:
            self._written(chunks, stored)

    def _written(self, chunks: Sequence[Chunk], stored: int) -> None:
        with self._lock:
            self._forget(chunk.key for chunk in chunks)
            self._remember([chunk.key for chunk in chunks[stored:]])

    def flush(self, timeout: float | None) -> bool:
        """Wait until all that was taken is stored or dropped; False where it takes longer."""
        with self._lock:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, timeout)

    def refuse(self) -> None:
        """Take no more, and let go whoever waits for room."""
        with self._lock:
            self._refuses = True
            self._changed.notify_all()

    def close(self, timeout: float) -> None:
        """Flush for at most `timeout` seconds, drop the rest, end the thread."""
        self.refuse()
        drained = self.flush(timeout)
        with self._lock:
            self._closed = True
            left = [job.chunk.key for job in self._jobs if isinstance(job, _Job)]
            self._jobs.clear()
            self.pending.clear()  # even what a hung store holds: nothing is found here any more
            self._changed.notify_all()
        if left:
            self._drop(left, Reason.DEADLINE)
        if drained and self._thread is not None:
            self._thread.join(timeout)
