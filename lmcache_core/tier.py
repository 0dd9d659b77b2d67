"""Tier: a backend with its serde chain, deadline, breaker and write-behind queue.

Nothing here raises for what a store does, and nothing waits longer than the tier's deadline.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from lmcache_core import frame
from lmcache_core.backend import Parts, StorageBackend
from lmcache_core.breaker import Breaker
from lmcache_core.chain import SerdeChain
from lmcache_core.config import TierConfig
from lmcache_core.errors import DeadlineExceeded, FrameError, StorageError
from lmcache_core.frame import Chunk
from lmcache_core.keys import ChunkKey
from lmcache_core.memory import HOST
from lmcache_core.observers import LOG, Observers
from lmcache_core.workers import Workers

T = TypeVar("T")

THREADS = 8
"""Calls that a tier may have under way; a hung one keeps its thread until it returns."""
READ_AHEAD = 4
"""Frames that wait, read but not yet taken by the loading thread."""
BATCH_BYTES = 64 << 20
"""Write-behind hands over about this much at a time."""
SLOWEST = 16 << 20
"""Bytes a second that even a slow store takes: adds to a store's deadline."""
MAX_HOLES = 65536


class Miss(NamedTuple):
    """Why a chunk that was asked for did not come."""

    reason: str


class _Job(NamedTuple):
    """Chunks to store, in the order of `chain`; none: only touch the chain."""

    chunks: tuple[Chunk, ...]
    chain: tuple[ChunkKey, ...]


class Tier:
    """One level of the cache."""

    def __init__(self, config: TierConfig, backend: StorageBackend, observers: Observers) -> None:
        self.name = config.name
        self.in_memory = backend.in_memory
        self._backend = backend
        self._chain = SerdeChain([s.create() for s in config.serde])
        self._deadline = config.deadline
        self._observers = observers
        self._breaker = Breaker(self.name, self._ping, self._state_changed)
        self._workers = Workers(f"lmcache-{self.name}", THREADS)
        self._writer = _Writer(self._write, self._drop, config.queue, config.when_full == "block")
        backend.on_evict = self._evicted

    # Reading

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which of `keys` this tier has; all False while it is bypassed or fails."""
        pending = self._writer.pending
        unknown = [key for key in keys if key not in pending]
        found: list[bool] | None = [False] * len(unknown)
        if unknown:
            found = self._guard("lookup", lambda: self._backend.contains(unknown, self._deadline))
        present = {key for key, there in zip(unknown, found or (), strict=False) if there}
        return [key in present or key in pending for key in keys]

    def fetch(self, keys: Sequence[ChunkKey]) -> Iterator[tuple[int, Chunk | Miss]]:
        """Yield (index into keys, chunk or why not) as chunks arrive, each index once."""
        left = set(range(len(keys)))
        reason = "evicted"  # what was asked for was there a moment ago
        for i, key in enumerate(keys):
            chunk = self._writer.pending.get(key)
            if chunk is not None:
                left.discard(i)
                yield i, chunk
        indices = sorted(left)
        wanted = [keys[i] for i in indices]
        if wanted and self._breaker.is_open:
            reason = "open"
        elif wanted:
            try:
                for i, parts in self._arrivals(wanted):
                    if indices[i] in left:
                        left.discard(indices[i])
                        yield indices[i], self._decode(parts, wanted[i])
                        del parts
                self._breaker.succeeded()
            except GeneratorExit:
                raise
            except Exception as error:
                reason = self._failed("load", error)
        for i in sorted(left):
            yield i, Miss(reason)

    def _arrivals(self, keys: Sequence[ChunkKey]) -> Iterator[tuple[int, Parts]]:
        if self.in_memory:
            yield from self._backend.get(keys, _allocate, self._deadline)
            return
        box: queue.Queue[tuple[int, Parts] | Exception | None] = queue.Queue(READ_AHEAD)
        stop = threading.Event()
        self._workers.submit(lambda: self._pump(keys, box, stop))
        try:
            while (item := self._next(box)) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
                del item
        finally:
            stop.set()

    def _next(
        self, box: queue.Queue[tuple[int, Parts] | Exception | None]
    ) -> tuple[int, Parts] | Exception | None:
        try:
            return box.get(timeout=self._deadline)
        except queue.Empty:
            raise DeadlineExceeded(f"no chunk within {self._deadline:.3g} s") from None

    def _pump(
        self,
        keys: Sequence[ChunkKey],
        box: queue.Queue[tuple[int, Parts] | Exception | None],
        stop: threading.Event,
    ) -> None:
        """Carry frames from the backend to the loading thread, on a thread that may hang."""
        last: Exception | None = None
        try:
            for item in self._backend.get(keys, _allocate, self._deadline):
                if not _offer(box, item, stop):
                    return
                del item
        except Exception as error:
            last = error
        _offer(box, last, stop)

    def _decode(self, parts: Parts, key: ChunkKey) -> Chunk | Miss:
        try:
            return frame.decode(parts, key, verify=not self.in_memory)
        except FrameError as error:
            LOG.warn(f"{self.name} {error.reason}", f"tier {self.name}: load: {key}: {error}")
            self._guard("delete", lambda: self._backend.delete([key], self._deadline))
            return Miss(error.reason)

    # Writing

    def store(self, chunks: Sequence[Chunk], chain: Sequence[ChunkKey]) -> int:
        """Store chunks in order, now or soon; returns how many were taken, from the first.

        `chain`: the sequence up to the last chunk, root first. Chunks that are not taken are
        counted as dropped.
        """
        if self.in_memory:
            return self._write(chunks, chain)
        return self._writer.add(chunks, chain)

    def touch(self, chain: Sequence[ChunkKey]) -> None:
        """The sequence was used."""
        if self.in_memory:
            self._guard("touch", lambda: self._backend.touch(chain, self._deadline))
        else:
            self._writer.add((), chain)

    def _write(self, chunks: Sequence[Chunk], chain: Sequence[ChunkKey]) -> int:
        """Returns how many chunks, from the first, the backend now has."""
        if not chunks:
            self._guard("touch", lambda: self._backend.touch(chain, self._deadline))
            return 0
        keys = [chunk.key for chunk in chunks]
        if self._breaker.is_open:
            self._drop(keys, "open")
            return 0
        try:
            stored = self._put(chunks, chain)
            self._breaker.succeeded()
        except Exception as error:
            self._drop(keys, self._failed("store", error))
            return 0
        if stored:
            nbytes = sum(chunk.nbytes for chunk in chunks[:stored])
            self._observers.tell("stored", tier=self.name, keys=keys[:stored], nbytes=nbytes)
        if stored < len(keys):
            self._drop(keys[stored:], "full")
        return stored

    def _put(self, chunks: Sequence[Chunk], chain: Sequence[ChunkKey]) -> int:
        if self.in_memory:
            frames = [(c.key, frame.encode(c, self._chain, seal=False)) for c in chunks]
            return self._backend.put(frames, chain, self._deadline)
        there = self._workers.call(
            lambda: self._backend.contains([c.key for c in chunks], self._deadline), self._deadline
        )
        missing = [c for c, present in zip(chunks, there, strict=True) if not present]
        frames = [(c.key, frame.encode(c, self._chain)) for c in missing]
        nbytes = sum(part.nbytes for _, parts in frames for part in parts)
        timeout = self._deadline + nbytes / SLOWEST
        stored = self._workers.call(lambda: self._backend.put(frames, chain, timeout), timeout)
        if stored == len(frames):
            return len(chunks)
        return next(i for i, c in enumerate(chunks) if c.key == frames[stored][0])

    def _drop(self, keys: Sequence[ChunkKey], reason: str) -> None:
        self._observers.tell("dropped", tier=self.name, reason=reason, keys=keys)

    # Trouble

    def _guard(self, operation: str, work: Callable[[], T]) -> T | None:
        """What `work` returns within the deadline; None, counted, while bypassed or failing."""
        if self._breaker.is_open:
            return None
        try:
            result = work() if self.in_memory else self._workers.call(work, self._deadline)
        except Exception as error:
            self._failed(operation, error)
            return None
        self._breaker.succeeded()
        return result

    def _failed(self, operation: str, error: Exception) -> str:
        """Log and count a failure; returns the reason to count its chunks under."""
        late = isinstance(error, DeadlineExceeded | TimeoutError)
        cause = str(error) or repr(error)
        kind = f"{self.name} {operation} {type(error).__name__}"
        LOG.warn(kind, f"tier {self.name}: {operation} failed: {cause}")
        self._breaker.failed(f"{operation}: {cause}", at_once=late)
        return "deadline" if late else "error"

    @property
    def is_open(self) -> bool:
        """Whether the tier is bypassed."""
        return self._breaker.is_open

    def _ping(self) -> None:
        self._backend.ping(self._deadline)

    def _state_changed(self, state: str, cause: str) -> None:
        LOG.warn(f"{self.name} {state}", f"tier {self.name} is {state}: {cause}")
        self._observers.tell("tier_state", tier=self.name, state=state, cause=cause)

    def _evicted(self, keys: Sequence[ChunkKey]) -> None:
        self._observers.tell("evicted", tier=self.name, keys=keys)

    def flush(self, timeout: float | None) -> bool:
        """Wait until what was taken is stored or dropped; False where that takes longer."""
        return self._writer.flush(timeout)

    def close(self, timeout: float) -> None:
        """Store what was taken, then release everything. A hung store is left behind."""
        self._writer.close(timeout)
        self._breaker.close()
        try:
            if self.in_memory:
                self._backend.close()
            else:
                self._workers.call(self._backend.close, self._deadline)
        except Exception as error:
            self._failed("close", error)
        self._workers.close()


class _Writer:
    """Write-behind: a bounded queue, readable while it waits, and the thread that empties it."""

    def __init__(
        self,
        write: Callable[[Sequence[Chunk], Sequence[ChunkKey]], int],
        drop: Callable[[Sequence[ChunkKey], str], None],
        budget: int,
        block: bool,
    ) -> None:
        self.pending: dict[ChunkKey, Chunk] = {}
        self._write, self._drop = write, drop
        self._budget, self._block = budget, block
        self._jobs: deque[_Job] = deque()
        self._bytes = 0
        self._holes: dict[ChunkKey, None] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._closed = False

    def add(self, chunks: Sequence[Chunk], chain: Sequence[ChunkKey]) -> int:
        """Queue chunks; returns how many, from the first, were taken."""
        with self._changed:
            taken, reason = self._admit(chunks, chain)
            job = _Job(tuple(chunks[:taken]), tuple(chain))
            if not self._closed and (taken or not chunks):
                self._jobs.append(job)
                self._start()
            dropped = [chunk.key for chunk in chunks[taken:]]
            self._remember(dropped)
        if dropped:
            self._drop(dropped, reason)
        return taken

    def _admit(self, chunks: Sequence[Chunk], chain: Sequence[ChunkKey]) -> tuple[int, str]:
        new = {chunk.key for chunk in chunks}
        if any(key in self._holes for key in chain if key not in new):
            return 0, "hole"  # behind a chunk that was dropped nothing could ever be found
        for taken, chunk in enumerate(chunks):
            if self._block:
                self._changed.wait_for(lambda n=chunk.nbytes: self._closed or self._fits(n))
            if self._closed or not self._fits(chunk.nbytes):
                return taken, "queue"
            if chunk.key not in self.pending:
                self.pending[chunk.key] = chunk
                self._bytes += chunk.nbytes
            self._holes.pop(chunk.key, None)
        return len(chunks), ""

    def _fits(self, nbytes: int) -> bool:
        return self._bytes + nbytes <= self._budget or not self.pending

    def _remember(self, dropped: Sequence[ChunkKey]) -> None:
        """Chunks that are missing in the store, whose descendants must stay out too."""
        self._holes.update(dict.fromkeys(dropped))
        while len(self._holes) > MAX_HOLES:
            del self._holes[next(iter(self._holes))]

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lmcache-writer", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        while (job := self._take()) is not None:
            self._do(job)
            with self._changed:
                self._busy = False
                self._changed.notify_all()
            del job  # hold no chunk while idle

    def _take(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            self._busy = True
            return self._jobs.popleft()

    def _do(self, job: _Job) -> None:
        if not job.chunks:
            self._write((), job.chain)
            return
        place = {key: i for i, key in enumerate(job.chain)}
        batches = list(_batches(job.chunks))
        for n, batch in enumerate(batches):
            chain = job.chain[: place[batch[-1].key] + 1]
            stored = self._write(batch, chain)
            if stored < len(batch):
                self._forget(batch, stored)
                rest = [chunk for later in batches[n + 1 :] for chunk in later]
                self._forget(rest, 0)
                if rest:
                    self._drop([chunk.key for chunk in rest], "hole")
                return
            self._forget(batch, stored)

    def _forget(self, batch: Sequence[Chunk], stored: int) -> None:
        with self._changed:
            for chunk in batch:
                if self.pending.pop(chunk.key, None) is not None:
                    self._bytes -= chunk.nbytes
            self._remember([chunk.key for chunk in batch[stored:]])
            self._changed.notify_all()

    def flush(self, timeout: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, timeout)

    def close(self, timeout: float) -> None:
        drained = self.flush(timeout)
        with self._changed:
            self._closed = True
            left = [chunk.key for job in self._jobs for chunk in job.chunks]
            self._jobs.clear()
            self._changed.notify_all()
        if left:
            self._drop(left, "deadline")
        if drained and self._thread is not None:
            self._thread.join(timeout)


def _batches(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    batch: list[Chunk] = []
    nbytes = 0
    for chunk in chunks:
        if batch and nbytes + chunk.nbytes > BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(chunk)
        nbytes += chunk.nbytes
    if batch:
        yield batch


def _offer(
    box: queue.Queue[tuple[int, Parts] | Exception | None],
    item: tuple[int, Parts] | Exception | None,
    stop: threading.Event,
) -> bool:
    """Put an item; False where nobody takes any more."""
    while not stop.is_set():
        try:
            box.put(item, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False


def _allocate(nbytes: int) -> memoryview:
    if nbytes > frame.MAX_FRAME_BYTES:
        raise StorageError(f"a frame of {nbytes} bytes; none has more than {frame.MAX_FRAME_BYTES}")
    return HOST.allocate(nbytes)
