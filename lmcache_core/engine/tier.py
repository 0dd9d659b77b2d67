"""Tier: a backend with its pipeline, deadline, breakers and write-behind queue.

Nothing here raises for what a store does. A silent store costs the tier's deadline, whoever waits;
how long one may take that sends something says patience.py.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from lmcache_core.backend import Allocate, StorageBackend
from lmcache_core.config.models import TierConfig
from lmcache_core.engine.breaker import Breaker
from lmcache_core.engine.unreadable import Unreadable
from lmcache_core.engine.write_behind import WriteBehind
from lmcache_core.errors import DeadlineExceeded, FrameError, StorageError
from lmcache_core.frames import frame
from lmcache_core.frames.limits import MAX_FRAME_BYTES
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.io.buffers import Buffers
from lmcache_core.io.daemon_pool import DaemonPool
from lmcache_core.io.memory import HOST
from lmcache_core.io.patience import SLOWEST, Flow, Patience
from lmcache_core.kv.chunk import Chunk
from lmcache_core.kv.keys import ChunkKey
from lmcache_core.kv.namespace import Namespace
from lmcache_core.plugins import blame
from lmcache_core.plugins.events import (
    Bypassed,
    Damaged,
    Dropped,
    Evicted,
    Failed,
    InUse,
    Loaded,
    LookedUp,
    Missed,
    Operation,
    Path,
    Reason,
    Removed,
    Stored,
    by_namespace,
)
from lmcache_core.plugins.log import LOG, log
from lmcache_core.plugins.observers import Observers
from lmcache_core.plugins.secrets import masked

T = TypeVar("T")

THREADS = 32
"""Calls that a tier may have under way; a hung one keeps its thread until it returns."""
ENCODERS = 2
"""Threads that encode the chunks of a batch; others are left to the engine."""
STREAMS = 256
"""Threads that read for loads; one whose load is put aside waits for it."""
READ_AHEAD = 2
"""Chunks that wait in each stream, read but not yet taken by the loading thread."""


class Miss(NamedTuple):
    """Why a chunk that was asked for did not come; the tier has counted it."""

    reason: str


_Wanted = tuple[int, ChunkKey]
"""A chunk's place in the load, and its key."""

_Arrival = tuple[int, Chunk | Miss] | Exception | None
"""What a reading thread hands over: a chunk, the error that ended its stream, or its end."""


class Tier:
    """One level of the cache.

    Reads and writes have a breaker each: a store that is full, read-only or slow to write to
    goes on serving loads.
    """

    def __init__(
        self, config: TierConfig, backend: StorageBackend, observers: Observers, chunk_size: int
    ) -> None:
        self.name = config.name
        self.in_memory = backend.in_memory
        self._backend = backend
        self._pipeline = Pipeline([serde.create() for serde in config.serde])
        self._chunk_size = chunk_size
        self._unreadable = Unreadable()
        self._deadline = config.deadline
        self._flow = Flow(config.deadline)
        self._observers = observers
        self._reads = Breaker(f"{self.name} reads", self.ping, self.state_changed("reads"))
        self._writes = Breaker(f"{self.name} writes", self.ping, self.state_changed("writes"))
        self._workers = DaemonPool(f"lmcache-{self.name}", THREADS)
        self._readers = DaemonPool(f"lmcache-{self.name}-read", STREAMS)
        self._encoders = DaemonPool(f"lmcache-{self.name}-encode", ENCODERS)
        block = config.when_full == "block"
        self._writer = WriteBehind(self._write, self._drop, config.queue, block=block)
        backend.on_evict = self._evicted
        backend.on_progress = self._flow.moved

    # Reading

    @property
    def bypassed(self) -> bool:
        """Whether the store is not read from for now."""
        return self._reads.is_open

    def contains(self, keys: Sequence[ChunkKey]) -> tuple[list[bool], str]:
        """Which of `keys` are here, and "" or the reason why the store could not tell."""
        waiting = self._waiting(keys)
        asked = [key for key in keys if key not in waiting] if waiting else keys
        found, reason = self._ask(asked) if asked else ([], "")
        if not waiting:
            return found, reason
        present = {key for key, there in zip(asked, found, strict=True) if there}
        return [key in present or key in waiting for key in keys], reason

    def _waiting(self, keys: Sequence[ChunkKey]) -> set[ChunkKey]:
        """Which of `keys` wait to be written: looked at once, for they leave at any moment."""
        pending = self._writer.pending
        return {key for key in keys if key in pending} if pending else set()

    def _ask(self, keys: Sequence[ChunkKey]) -> tuple[list[bool], str]:
        nothing = [False] * len(keys)
        if self._reads.is_open:
            return nothing, Reason.BYPASSED
        begin = time.monotonic()
        try:
            found = self._call(lambda: self._backend.contains(keys, self._deadline))
            if len(found) != len(keys):
                raise StorageError(f"{len(found)} answers to {len(keys)} keys")
        except Exception as error:
            return nothing, self._failed(self._reads, "lookup", error)
        self._reads.succeeded()
        found = self._unreadable.hide(keys, found)
        seconds = time.monotonic() - begin
        event = LookedUp(tier=self.name, chunks=len(keys), found=sum(found), seconds=seconds)
        self._observers.tell(event)
        return found, ""

    def fetch(self, keys: Sequence[ChunkKey]) -> Generator[tuple[int, Chunk | Miss], None, None]:
        """Yield (index into keys, chunk or why not) as chunks arrive, each index once."""
        left = dict.fromkeys(range(len(keys)))
        for i, key in enumerate(keys):
            chunk = self._writer.pending.get(key)
            if chunk is not None:
                del left[i]
                yield i, chunk
        wanted = [(i, keys[i]) for i in left]
        reason = Reason.EVICTED  # the lookup a moment ago said that it is there
        if self._reads.is_open:
            reason, wanted = Reason.BYPASSED, []
        try:
            for i, got in self._arrivals(wanted):
                if i in left:
                    del left[i]
                    self._suspect(got, (keys[n] for n in left if n > i))
                    yield i, got
                del got
            if wanted:
                self._reads.succeeded()
        except Exception as error:
            reason = self._failed(self._reads, "load", error)
        if left:
            self._missed([keys[i] for i in left], reason)
        for i in left:
            yield i, Miss(reason)

    def _suspect(self, got: Chunk | Miss, following: Iterable[ChunkKey]) -> None:
        """What follows a frame that is not read here mostly is not either, and nobody reads on to
        find out."""
        if isinstance(got, Miss) and got.reason == "unreadable":
            self._unreadable.add(following)

    def _arrivals(self, wanted: Sequence[_Wanted]) -> Iterator[tuple[int, Chunk | Miss]]:
        if self.in_memory:
            return self._recall(wanted)
        streams = min(self._backend.streams, len(wanted))
        return self._merged([wanted[n::streams] for n in range(streams)])

    def _recall(self, wanted: Sequence[_Wanted]) -> Iterator[tuple[int, Chunk | Miss]]:
        """Frames from memory, decoded: nobody waits for them."""
        keys = [key for _, key in wanted]
        for place, parts in self._backend.get(keys, _allocate, self._deadline):
            i, key = wanted[place]
            yield i, self._decode(parts, key)
            del parts

    def _read(
        self, wanted: Sequence[_Wanted], patience: Patience
    ) -> Iterator[tuple[int, Chunk | Miss]]:
        """Frames from a store that may be slow, decoded."""
        keys = [key for _, key in wanted]

        def allocate(nbytes: int) -> memoryview:
            buffer = _allocate(nbytes)
            patience.promise(nbytes)
            return buffer

        for place, parts in self._backend.get(keys, allocate, self._deadline):
            nbytes = sum(part.nbytes for part in parts)
            patience.came(nbytes)
            i, key = wanted[place]
            got = self._decode(parts, key)
            del parts
            if isinstance(got, Chunk):
                patience.decoded(got.nbytes - nbytes)
            yield i, got
            del got

    def _merged(self, streams: Sequence[Sequence[_Wanted]]) -> Iterator[tuple[int, Chunk | Miss]]:
        """What a thread for each stream reads ahead, in turn. They may hang; this does not."""
        boxes: list[queue.Queue[_Arrival]] = [queue.Queue(READ_AHEAD) for _ in streams]
        stop = threading.Event()
        patience = Patience(self._flow)
        try:
            for wanted, box in zip(streams, boxes, strict=True):
                self._readers.submit(partial(self._pump, wanted, patience, box, stop))
            while boxes:
                box = boxes.pop(0)
                item = patience.take(box)
                if isinstance(item, Exception):
                    raise item
                if item is not None:
                    yield item
                    boxes.append(box)
                del item
        finally:
            stop.set()

    def _pump(
        self,
        wanted: Sequence[_Wanted],
        patience: Patience,
        box: queue.Queue[_Arrival],
        stop: threading.Event,
    ) -> None:
        last: Exception | None = None
        try:
            for item in self._read(wanted, patience):
                if not _offer(box, item, stop):
                    return
                del item
        except Exception as error:
            last = error
        _offer(box, last, stop)

    def _decode(self, parts: Buffers, key: ChunkKey) -> Chunk | Miss:
        try:
            chunk = frame.decode(
                parts, key, self._pipeline, self._chunk_size, verify=not self.in_memory
            )
        except FrameError as error:
            LOG.warn(f"{self.name} {error.reason}", f"tier {self.name}: load: {key}: {error}")
            self._unreadable.add([key])
            if error.reason != "unreadable":  # another version or serde of ours may read it
                self._soon("delete", lambda: self._remove([key]))
            reason = Reason(error.reason)
            self._observers.tell(
                Damaged(tier=self.name, keys=(key,), reason=reason, cause=blame.cause(error))
            )
            self._missed([key], reason)
            return Miss(error.reason)
        self._unreadable.discard([key])
        return chunk

    def _remove(self, keys: Sequence[ChunkKey]) -> None:
        """Delete frames that are worthless here, and in the way of what is stored anew."""
        if keys:
            self._backend.delete(keys, self._deadline)
            self._unreadable.discard(keys)
            self._observers.tell(Removed(tier=self.name, keys=tuple(keys)))

    def _missed(self, keys: Sequence[ChunkKey], reason: str) -> None:
        event = Missed(tier=self.name, keys=tuple(keys), reason=Reason(reason))
        self._observers.tell(event)

    def tell_loaded(self, keys: Sequence[ChunkKey], nbytes: int, seconds: float) -> None:
        """These chunks, of one sequence, came from this tier in one load."""
        event = Loaded(tier=self.name, keys=tuple(keys), nbytes=nbytes, seconds=seconds)
        self._observers.tell(event)

    # Writing

    def lacks(self, key: ChunkKey) -> bool:
        """Whether a chunk was dropped here earlier and is worth offering again."""
        return key in self._writer.holes and not self._writes.is_open

    def room(self, chain: Sequence[ChunkKey]) -> Allocate:
        """Where to gather the last chunk of `chain` into: memory of the store's own, if it has."""

        def allocate(nbytes: int) -> memoryview:
            room = None
            if self.in_memory and not self._writes.is_open:
                try:
                    room = self._backend.room(nbytes, chain, self._deadline)
                except Exception as error:
                    self._failed(self._writes, "store", error)
            return HOST.allocate(nbytes) if room is None else room

        return allocate

    def store(self, chunk: Chunk, keys: tuple[ChunkKey, ...]) -> str:
        """Store a chunk of the sequence `keys`, now or soon; returns "" or why it was refused.

        The caller counts what is refused (by `drop`) and what memory has stored at once.
        """
        try:
            if not self.in_memory:
                return self._writer.add(chunk, keys)
            if self._writes.is_open:
                return Reason.BYPASSED
            frames = [(chunk.key, frame.encode(chunk, self._pipeline, checksum=False))]
            self._remove(self._unreadable.among([chunk.key]))
            stored = self._backend.put(frames, keys[: chunk.index + 1], self._deadline)
        except Exception as error:
            return self._failed(self._writes, "store", error)
        self._writes.succeeded()
        return "" if stored else "full"

    def drop(self, keys: Sequence[ChunkKey], reason: str) -> None:
        """Count chunks that this tier will not have."""
        if keys:
            self._writer.missing(keys)
            self._drop(keys, reason)

    def raw_bytes(self, namespace: Namespace, tokens: int) -> int:
        """Bytes of a chunk's frame here, where no serde changes how many there are."""
        return frame.raw_bytes(namespace, tokens, self._pipeline)

    def touch(self, keys: tuple[ChunkKey, ...]) -> None:
        """The sequence was used."""
        if not self._writer.behind:
            self._soon("touch", lambda: self._backend.touch(keys, self._deadline))

    def _soon(self, operation: Operation, work: Callable[[], None]) -> None:
        """Tell the store something; memory at once, others after what waits to be written, unless
        they are bypassed then."""
        tell = partial(self._tell, operation, work)
        if self.in_memory:
            tell()
        else:
            self._writer.call(tell)

    def _tell(self, operation: Operation, work: Callable[[], None]) -> None:
        if self._writes.is_open:
            return
        try:
            self._call(work)
        except Exception as error:
            self._failed(self._writes, operation, error)
        else:
            self._writes.succeeded()

    def _write(self, chunks: Sequence[Chunk], chain: Sequence[ChunkKey]) -> int:
        """Returns how many chunks, from the first, the backend now has."""
        keys = [chunk.key for chunk in chunks]
        if self._writes.is_open:
            self._drop(keys, Reason.BYPASSED)
            return 0
        begin = time.monotonic()
        try:
            stored = self._put(chunks, chain)
        except Exception as error:
            self._drop(keys, self._failed(self._writes, "store", error))
            return 0
        self._writes.succeeded()
        if stored:
            nbytes = sum(chunk.nbytes for chunk in chunks[:stored])
            self.tell_stored(keys[:stored], nbytes, time.monotonic() - begin)
        self._drop(keys[stored:], "full")
        return stored

    def _put(self, chunks: Sequence[Chunk], chain: Sequence[ChunkKey]) -> int:
        keys = [chunk.key for chunk in chunks]
        there = self._call(lambda: self._backend.contains(keys, self._deadline))
        there = self._unreadable.hide(keys, there)
        missing = [c for c, present in zip(chunks, there, strict=True) if not present]
        jobs = [self._encoders.submit(partial(frame.encode, c, self._pipeline)) for c in missing]
        frames = [(c.key, job.result()) for c, job in zip(missing, jobs, strict=True)]
        nbytes = sum(part.nbytes for _, parts in frames for part in parts)
        self._call(lambda: self._remove(self._unreadable.among(keys)))
        timeout = self._deadline + nbytes / SLOWEST
        stored = self._workers.call(lambda: self._backend.put(frames, chain, timeout), timeout)
        if stored >= len(frames):
            return len(chunks)
        return keys.index(frames[stored][0])

    def tell_stored(self, keys: Sequence[ChunkKey], nbytes: int, seconds: float) -> None:
        """This tier now has these chunks, of one sequence."""
        event = Stored(tier=self.name, keys=tuple(keys), nbytes=nbytes, seconds=seconds)
        self._observers.tell(event)

    def _drop(self, keys: Sequence[ChunkKey], reason: str) -> None:
        for some in by_namespace(keys):
            self._observers.tell(Dropped(tier=self.name, keys=some, reason=Reason(reason)))

    # Trouble

    def _call(self, work: Callable[[], T]) -> T:
        """What `work` returns; raises DeadlineExceeded where a store takes too long for it."""
        return work() if self.in_memory else self._workers.call(work, self._deadline)

    def _failed(self, breaker: Breaker, operation: Operation, error: Exception) -> Reason:
        """Log and count a failure; returns the reason to count its chunks under."""
        late = isinstance(error, DeadlineExceeded | TimeoutError)
        reason = Reason.DEADLINE if late else Reason.ERROR
        cause = blame.cause(error)
        log.debug("tier %s: %s: %s", self.name, operation, blame.culprit(error, self._backend))
        kind = f"{self.name} {operation} {type(error).__name__}"
        LOG.warn(kind, f"tier {self.name}: {operation} failed: {cause}")
        event = Failed(tier=self.name, operation=operation, reason=reason, cause=cause)
        self._observers.tell(event)
        breaker.failed(f"{operation}: {cause}", at_once=late)
        return reason

    def ping(self) -> None:
        """Return if the store answers; else raise what it raises, or DeadlineExceeded."""
        self._call(lambda: self._backend.ping(self._deadline))

    def state_changed(self, path: Path) -> Callable[[str, str], None]:
        """Who is to hear that a path, such as "reads", is "open", that is bypassed, or "closed"."""

        def changed(state: str, cause: str) -> None:
            text = f"tier {self.name}: {path} are {'bypassed' if state == 'open' else 'back'}"
            LOG.warn(f"{self.name} {path} {state}", f"{text}: {cause}")
            kind = Bypassed if state == "open" else InUse
            self._observers.tell(kind(tier=self.name, path=path, cause=masked(cause)))

        return changed

    def _evicted(self, keys: Sequence[ChunkKey]) -> None:
        for some in by_namespace(keys):
            self._observers.tell(Evicted(tier=self.name, keys=some))

    def flush(self, timeout: float | None) -> bool:
        """Wait until what was taken is stored or dropped; False where that takes longer."""
        return self._writer.flush(timeout)

    def close(self, timeout: float) -> None:
        """Store what was taken, then release everything. A hung store is left behind."""
        self._writer.close(timeout)
        self._reads.close()
        self._writes.close()
        try:
            self._call(self._backend.close)
        except Exception as error:
            self._failed(self._writes, "close", error)
        self._workers.close()
        self._readers.close()
        self._encoders.close()


def _offer(box: queue.Queue[_Arrival], item: _Arrival, stop: threading.Event) -> bool:
    """Put an item; False where nobody takes any more."""
    while not stop.is_set():
        try:
            box.put(item, timeout=0.05)
        except queue.Full:
            continue
        return True
    return False


def _allocate(nbytes: int) -> memoryview:
    if nbytes > MAX_FRAME_BYTES:
        raise StorageError(f"a frame of {nbytes} bytes; none has more than {MAX_FRAME_BYTES}")
    return HOST.allocate(nbytes)
