"""Tier: a backend with its pipeline, deadline, breakers and write-behind queue.

Nothing here raises for what a store does. What one call may take says its Transfer, which is made
here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from lmcache_core.backend import Hint, StorageBackend, SupportsHint, SupportsReserve, SupportsScan
from lmcache_core.backend import Stored as Scanned
from lmcache_core.config.models import TierConfig
from lmcache_core.engine import contract
from lmcache_core.engine.streams import merged
from lmcache_core.engine.unreadable import Unreadable
from lmcache_core.engine.write_behind import WriteBehind
from lmcache_core.errors import ConfigError, FrameError, Refused, StorageError
from lmcache_core.frames import frame
from lmcache_core.frames.limits import MAX_FRAME_BYTES
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.io import process
from lmcache_core.io.breaker import Breaker, State
from lmcache_core.io.buffers import Buffers, nbytes_of
from lmcache_core.io.calls import Calls
from lmcache_core.io.daemon_pool import DaemonPool
from lmcache_core.io.memory import HOST
from lmcache_core.io.transfer import Line, Transfer
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
from lmcache_core.plugins.options import Bounded
from lmcache_core.plugins.secrets import masked

T = TypeVar("T")

OPEN_SECONDS = 1.0
"""How long opening a tier may keep an engine waiting, at most."""
THREADS = 32
"""Calls that a tier may have under way; a hung one keeps its thread until it returns."""
ENCODERS = 2
"""Threads that encode the chunks of a batch; others are left to the engine."""
JOIN_SECONDS = 0.02
"""How long an idle thread may take to end, where the deadline is over,"""
EXIT_JOIN_SECONDS = 2.0
"""and where the interpreter ends."""
READERS = 256
"""Threads that read for loads."""


class Miss(NamedTuple):
    """Why a chunk that was asked for did not come; the tier has counted it."""

    reason: Reason


class Found(NamedTuple):
    """What a lookup in one tier says of each key, and why the tier could not tell, if so."""

    present: list[bool]
    reason: Reason | None = None


_Wanted = tuple[int, ChunkKey]
"""A chunk's index in the load, and its key."""
_Arrival = tuple[int, Chunk | Miss]


class Tier:
    """One level of the cache.

    Reads and writes have a breaker each: a store that is full, read-only or slow to write to
    goes on serving loads.
    """

    def __init__(
        self,
        config: TierConfig,
        kind: type[StorageBackend],
        observers: Observers,
        chunk_size: int,
        *,
        strict: bool = False,
    ) -> None:
        """Open the store. One that is down, or takes longer than the deadline or OPEN_SECONDS, is
        bypassed and opened beside what the engine does. Raises ConfigError where it cannot be used
        at all; if `strict`, also where it is down."""
        self.name = config.name
        self.in_memory = kind.in_memory
        self._config, self._kind = config, kind
        self._pipeline = Pipeline([serde.create() for serde in config.serde])
        self._chunk_size = chunk_size
        self._unreadable = Unreadable()
        self.deadline = config.deadline
        self._line = Line()
        self._observers = observers
        self._reads = Breaker(f"{self.name} reads", self.ping, self.state_changed("reads"))
        self._writes = Breaker(f"{self.name} writes", self.ping, self.state_changed("writes"))
        self._workers = DaemonPool(f"lmcache-{self.name}", THREADS)
        self._readers = DaemonPool(f"lmcache-{self.name}-read", READERS)
        self._encoders = DaemonPool(f"lmcache-{self.name}-encode", ENCODERS)
        block = config.when_full == "block"
        self._codecs = Calls()
        """Threads that decode or encode."""
        self._writer = WriteBehind(self._write, self._drop, config.queue, block=block)
        self._opened: StorageBackend | None = None
        self.lends = False
        """Whether chunks may lie in memory of the store's own, which others share."""
        self._opening = threading.Lock()
        self._refuses = self._closed = False
        try:
            self._open(strict)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        paths = {"reads": self._reads, "writes": self._writes}
        bypassed = [path for path, breaker in paths.items() if breaker.bypassed]
        state = f"{' and '.join(bypassed)} bypassed" if bypassed else State.IN_USE
        return f"<Tier {self.name}: {state}, {self._writer!r}, {self._opened!r}>"

    # Opening

    def _open(self, strict: bool) -> None:
        transfer = Transfer(min(self.deadline, OPEN_SECONDS))
        try:
            self._workers.call(partial(self._connect, transfer), transfer)
        except (ConfigError, Refused) as error:
            raise ConfigError(f"{self._config.where}: {blame.cause(error)}") from error
        except Exception as error:
            if strict:
                cause = f"{self._config.where}: does not answer: {blame.cause(error)}"
                raise ConfigError(cause) from error
            for breaker in (self._reads, self._writes):
                breaker.failed(f"down at start: {blame.cause(error)}", at_once=True)

    def _connect(self, transfer: Transfer) -> None:
        """Make the backend, unless it is made already, and see that its store answers."""
        if not self._opening.acquire(blocking=False):
            raise StorageError("still being opened")
        try:
            if self._opened is None:
                self._adopt(self._make())
        finally:
            self._opening.release()
        self._backend.ping(transfer)

    def _make(self) -> StorageBackend:
        try:
            return contract.backend_made(self._kind(self._config.options))
        except StorageError:
            raise
        except BaseException as error:  # a plugin's may be any, SystemExit included
            log.debug("tier %s: open: %s", self.name, blame.culprit(error, self._kind, "__init__"))
            raise ConfigError(blame.cause(error)) from error

    def _adopt(self, backend: StorageBackend) -> None:
        self.lends = self.in_memory and isinstance(backend, SupportsReserve)
        self._opened = backend
        if self._closed:  # while it was made
            backend.close()
            raise StorageError("closed")

    @property
    def _backend(self) -> StorageBackend:
        if self._opened is None:
            raise StorageError("not open yet")
        return self._opened

    # Reading

    def keeps(self, chunk: Chunk) -> bool:
        """Whether a chunk that was loaded from here is still used here."""
        return self.in_memory or self._writer.pending.get(chunk.key) is chunk

    @property
    def bypassed(self) -> bool:
        """Whether the store is not read from for now."""
        return self._reads.bypassed

    def contains(self, keys: Sequence[ChunkKey]) -> Found:
        """Which of `keys` are here."""
        waiting = self._waiting(keys)
        asked = [key for key in keys if key not in waiting] if waiting else keys
        found = self._ask(asked) if asked else Found([])
        if not waiting:
            return found
        there = {key for key, present in zip(asked, found.present, strict=True) if present}
        return Found([key in there or key in waiting for key in keys], found.reason)

    def _waiting(self, keys: Sequence[ChunkKey]) -> set[ChunkKey]:
        """Which of `keys` wait to be written: looked at once, for they leave at any moment."""
        pending = self._writer.pending
        return {key for key in keys if key in pending} if pending else set()

    def _ask(self, keys: Sequence[ChunkKey]) -> Found:
        if self._reads.bypassed:
            return Found([False] * len(keys), Reason.BYPASSED)
        begin = time.monotonic()
        before = set(self._unreadable.among(keys))  # which may be there no more when it answers
        try:
            present = self._call(lambda transfer: self._look(keys, transfer))
        except Exception as error:
            return Found([False] * len(keys), self._failed(self._reads, "lookup", error))
        self._reads.succeeded(proof=False)
        present = self._unreadable.hide(keys, present)
        present = [there and key not in before for key, there in zip(keys, present, strict=True)]
        seconds = time.monotonic() - begin
        found = sum(present)
        event = LookedUp(tier=self.name, chunks=len(keys), found=found, seconds=seconds)
        self._observers.tell(event)
        return Found(present)

    def _look(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        return contract.found(self._backend.contains(keys, transfer), len(keys))

    def fetch(self, keys: Sequence[ChunkKey]) -> Generator[_Arrival, None, None]:
        """Yield (index into keys, chunk or why not) as chunks arrive, each index once."""
        left = dict.fromkeys(range(len(keys)))
        for i, key in enumerate(keys):
            chunk = self._writer.pending.get(key)
            if chunk is not None:
                del left[i]
                yield i, chunk
        wanted = [(i, keys[i]) for i in left]
        reason = Reason.EVICTED
        if self._reads.bypassed:
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
        if isinstance(got, Miss) and got.reason == Reason.UNREADABLE:
            self._unreadable.add(following)

    def _arrivals(self, wanted: Sequence[_Wanted]) -> Iterator[_Arrival]:
        if self.in_memory:
            transfer = Transfer(self.deadline, limit=MAX_FRAME_BYTES)
            return contract.failing(self._read(wanted, transfer))
        streams = min(contract.streams(self._backend.streams), len(wanted))
        transfer = self._transfer()
        parts = [self._read(wanted[n::streams], transfer) for n in range(streams)]
        return merged(parts, self._readers, transfer)

    def _read(
        self, wanted: Sequence[_Wanted], transfer: Transfer
    ) -> Generator[_Arrival, None, None]:
        """Frames of one stream, decoded."""
        keys = [key for _, key in wanted]
        for frame_read in self._backend.get(keys, transfer):
            index, parts = contract.read(frame_read, len(keys))
            del frame_read
            nbytes = nbytes_of(parts)
            transfer.arrived(nbytes)
            i, key = wanted[index]
            got = self._decode(parts, key)
            del parts
            if isinstance(got, Chunk):
                transfer.decoded(max(0, got.nbytes - nbytes))
            yield i, got
            del got

    def _decode(self, parts: Buffers, key: ChunkKey) -> Chunk | Miss:
        try:
            with self._codecs:
                if self._closed:
                    return Miss(Reason.BYPASSED)
                verify = not self.in_memory
                chunk = frame.decode(parts, key, self._pipeline, self._chunk_size, verify=verify)
        except FrameError as error:
            LOG.warn(f"{self.name} {error.reason}", f"tier {self.name}: load: {key}: {error}")
            self._unreadable.add([key])
            if error.reason != "unreadable":  # another version or serde of ours may read it
                self._soon("delete", lambda transfer: self._remove([key], transfer))
            reason = Reason(error.reason)
            self._observers.tell(
                Damaged(tier=self.name, keys=(key,), reason=reason, cause=blame.cause(error))
            )
            self._missed([key], reason)
            return Miss(reason)
        self._unreadable.discard([key])
        return chunk

    def _remove(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        """Delete frames that are worthless here, and in the way of what is stored anew."""
        if keys:
            self._backend.delete(keys, transfer)
            self._unreadable.discard(keys)
            self._observers.tell(Removed(tier=self.name, keys=tuple(keys)))

    def _missed(self, keys: Sequence[ChunkKey], reason: Reason) -> None:
        self._observers.tell(Missed(tier=self.name, keys=tuple(keys), reason=reason))

    def tell_loaded(self, keys: Sequence[ChunkKey], nbytes: int, seconds: float) -> None:
        """These chunks, of one sequence, came from this tier in one load."""
        event = Loaded(tier=self.name, keys=tuple(keys), nbytes=nbytes, seconds=seconds)
        self._observers.tell(event)

    # Writing

    def lacks(self, key: ChunkKey) -> bool:
        """Whether a chunk was dropped here earlier and is worth offering again."""
        return key in self._writer.holes and not self._writes.bypassed

    def reserve(self, nbytes: int, keys: Sequence[ChunkKey]) -> memoryview:
        """Where to gather a chunk of the sequence `keys` into: memory of the store's own, if it
        has."""
        if not self.in_memory or self._writes.bypassed:
            return HOST.allocate(nbytes)
        room = None
        try:
            backend = self._backend
            if isinstance(backend, SupportsReserve):
                given = self._call(lambda transfer: backend.reserve(nbytes, keys, transfer))
                room = contract.room(given, nbytes)
        except Exception as error:
            self._failed(self._writes, "store", error)
            room = None
        return HOST.allocate(nbytes) if room is None else room

    def store(self, chunk: Chunk, keys: tuple[ChunkKey, ...]) -> Reason | None:
        """Store a chunk of the sequence `keys`, now or soon; or say why it is refused.

        The caller counts what is refused (by `drop`) and what memory has stored at once, and
        touches the sequence in memory when all of it is stored.
        """
        try:
            if not self.in_memory:
                return self._writer.add(chunk, keys)
            if self._writes.bypassed:
                return Reason.BYPASSED
            encode = partial(frame.encode, chunk, self._pipeline, checksum=False)
            frames = [(chunk.key, _on_this_thread(encode))]
            stored = self._call(lambda transfer: self._replace(frames, keys, transfer))
        except Exception as error:
            return self._failed(self._writes, "store", error)
        self._writes.succeeded()
        return None if stored else Reason.FULL

    def drop(self, keys: Sequence[ChunkKey], reason: Reason) -> None:
        """Count chunks that this tier will not have."""
        if keys:
            self._writer.missing(keys)
            self._drop(keys, reason)

    def used(self, keys: tuple[ChunkKey, ...]) -> None:
        """A load took the sequence."""
        if not self._writer.behind:
            self._soon("touch", lambda transfer: self._backend.used(keys, transfer))

    def touch(self, keys: tuple[ChunkKey, ...]) -> None:
        """A store passed along the sequence."""
        if not self._writer.behind:
            self._soon("touch", lambda transfer: self._backend.touch(keys, transfer))

    def hint(self, keys: tuple[ChunkKey, ...], hint: Hint) -> None:
        """The caller knows how the sequence goes on."""
        backend = self._opened
        if isinstance(backend, SupportsHint):
            self._soon("touch", lambda transfer: backend.hint(keys, hint, transfer))

    def _soon(self, operation: Operation, work: Callable[[Transfer], None]) -> None:
        """Tell the store something; memory at once, others after what waits to be written, unless
        they are bypassed then, or close."""
        call = partial(self._call, work)
        if self.in_memory:
            self._tell(operation, call)
        else:
            self._writer.call(lambda: None if self._refuses else self._tell(operation, call))

    def _tell(self, operation: Operation, call: Callable[[], None]) -> None:
        if self._writes.bypassed:
            return
        try:
            call()
        except Exception as error:
            self._failed(self._writes, operation, error)
        else:
            self._writes.succeeded(proof=False)

    def _write(self, chunks: Sequence[Chunk], keys: tuple[ChunkKey, ...]) -> int:
        """Store some chunks of a sequence; returns how many, from the first, the backend now has.

        The sequence is touched with its last chunk. All of it has one clock.
        """
        mine, begin, transfer = [chunk.key for chunk in chunks], time.monotonic(), self._transfer()
        if self._writes.bypassed:
            self._drop(mine, Reason.BYPASSED)
            return 0
        try:
            stored = self._put(chunks, keys, transfer)
        except Exception as error:
            self._drop(mine, self._failed(self._writes, "store", error))
            return 0
        self._writes.succeeded()
        if stored:
            nbytes = sum(chunk.nbytes for chunk in chunks[:stored])
            self.tell_stored(mine[:stored], nbytes, time.monotonic() - begin)
        self._drop(mine[stored:], Reason.FULL)
        end = chunks[-1].index + 1
        if end == len(keys) or stored < len(chunks):
            touch = partial(self._backend.touch, keys[:end])
            self._tell("touch", partial(self._moving, touch, transfer))
        return stored

    def _encode(self, chunk: Chunk) -> list[memoryview]:
        with self._codecs:
            if self._closed:
                raise StorageError("closed")
            return frame.encode(chunk, self._pipeline)

    def _moving(self, work: Callable[[Transfer], T], transfer: Transfer) -> T:
        """What a part of a longer call returns."""
        with transfer.waiting():
            return self._workers.call(lambda: work(transfer), transfer)

    def _put(self, chunks: Sequence[Chunk], keys: tuple[ChunkKey, ...], transfer: Transfer) -> int:
        mine = [chunk.key for chunk in chunks]
        there = self._moving(partial(self._look, mine), transfer)
        there = self._unreadable.hide(mine, there)
        missing = [c for c, present in zip(chunks, there, strict=True) if not present]
        jobs = [self._encoders.submit(partial(self._encode, chunk)) for chunk in missing]
        frames = [(c.key, job.result()) for c, job in zip(missing, jobs, strict=True)]
        transfer.promise(sum(nbytes_of(parts) for _, parts in frames))
        stored = self._moving(partial(self._replace, frames, keys), transfer)
        self._evicted(transfer)
        if stored >= len(frames):
            return len(chunks)
        return mine.index(frames[stored][0])

    def _replace(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> int:
        """Put frames, also where others lie that cannot be read."""
        self._remove(self._unreadable.among([key for key, _ in frames]), transfer)
        stored = contract.stored(self._backend.put(frames, prefix, transfer), len(frames))
        if stored < len(frames):
            self._warn_of_size(nbytes_of(frames[stored][1]))
        return stored

    def _warn_of_size(self, nbytes: int) -> None:
        """Say it where no frame of that size is ever stored: what serdes make of a chunk nobody
        knows before."""
        options = self._config.options
        if isinstance(options, Bounded) and options.bytes_for(nbytes) > options.capacity:
            LOG.warn(
                f"{self.name} capacity",
                f"tier {self.name}: {self._config.where}.capacity: {options.capacity} bytes hold "
                f"no chunk of {options.bytes_for(nbytes)} bytes: none of that size is ever stored",
            )

    # Removing

    def take_out(self, keys: Sequence[ChunkKey], timeout: float | None = None) -> int:
        """Remove chunks, those that wait to be written, too; how many there were.

        Raises what the store raises, and DeadlineExceeded after `timeout` seconds, by default the
        deadline.
        """
        seconds = self.deadline if timeout is None else timeout
        waited = self._writer.cancel(keys, seconds)
        there = self._work(lambda transfer: self._delete(keys, transfer), seconds)
        gone = waited.union(there)
        for some in by_namespace(gone):
            self._observers.tell(Removed(tier=self.name, keys=some))
        return len(gone)

    def _delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[ChunkKey]:
        found = self._look(keys, transfer)
        there = [key for key, present in zip(keys, found, strict=True) if present]
        self._backend.delete(there, transfer)
        self._unreadable.discard(there)
        return there

    def scan(self, timeout: float) -> list[Scanned]:
        """All that is there or waits to be written. Raises StorageError where the store cannot
        tell."""
        backend = self._backend
        if not isinstance(backend, SupportsScan):
            raise StorageError("cannot tell what it has")

        def scan(transfer: Transfer) -> dict[ChunkKey, Scanned]:
            stored = map(contract.scanned, backend.scan(transfer))
            return {each.key: each for each in stored}

        there = self._work(scan, timeout)
        waiting = [Scanned(c.key, c.nbytes) for c in list(self._writer.pending.values())]
        return [*there.values(), *(each for each in waiting if each.key not in there)]

    def frame(self, key: ChunkKey) -> bytes:
        """The bytes of a chunk's frame as they lie in the store. Raises StorageError where there is
        none."""

        def read(transfer: Transfer) -> bytes:
            for got in self._backend.get([key], transfer):
                return b"".join(contract.read(got, 1)[1])
            raise StorageError(f"{key} is not there")

        return self._work(read, self.deadline)

    def namespace_of(self, key: ChunkKey) -> Namespace | None:
        """What a chunk that is here says of its namespace; None where that cannot be read."""
        waits = self._writer.pending.get(key)
        if waits is not None:
            return waits.namespace

        def read(transfer: Transfer) -> Namespace | None:
            for got in self._backend.get([key], transfer):
                return frame.namespace(contract.read(got, 1)[1], key)
            return None

        try:
            return self._work(read, self.deadline)
        except FrameError:
            return None

    def raw_bytes(self, namespace: Namespace, tokens: int) -> int:
        """Bytes of a chunk's frame here, where no serde changes how many there are."""
        return frame.raw_bytes(namespace, tokens, self._pipeline)

    def tell_stored(self, keys: Sequence[ChunkKey], nbytes: int, seconds: float) -> None:
        """This tier now has these chunks, of one sequence."""
        event = Stored(tier=self.name, keys=tuple(keys), nbytes=nbytes, seconds=seconds)
        self._observers.tell(event)

    def _drop(self, keys: Sequence[ChunkKey], reason: Reason) -> None:
        for some in by_namespace(keys):
            self._observers.tell(Dropped(tier=self.name, keys=some, reason=reason))

    def _evicted(self, transfer: Transfer) -> None:
        for some in by_namespace(map(ChunkKey, transfer.evicted)):
            self._observers.tell(Evicted(tier=self.name, keys=some))

    # Trouble

    def _transfer(self) -> Transfer:
        """The clock of a call that moves frames, beside others."""
        return Transfer(self.deadline, self._line, limit=MAX_FRAME_BYTES, waits=False)

    def _call(self, work: Callable[[Transfer], T]) -> T:
        """What `work` returns; raises DeadlineExceeded where a store takes too long for it."""
        return self._work(work, self.deadline)

    def _work(self, work: Callable[[Transfer], T], seconds: float) -> T:
        transfer = Transfer(seconds, limit=MAX_FRAME_BYTES)
        try:
            if self.in_memory:
                return _on_this_thread(lambda: work(transfer))
            return self._workers.call(lambda: work(transfer), transfer)
        finally:
            self._evicted(transfer)

    def _failed(self, breaker: Breaker, operation: Operation, error: Exception) -> Reason:
        """Log and count a failure; returns the reason to count its chunks under."""
        reason = Reason.DEADLINE if isinstance(error, TimeoutError) else Reason.ERROR
        cause = blame.cause(error)
        log.debug("tier %s: %s: %s", self.name, operation, self._culprit(error))
        kind = f"{self.name} {operation} {type(error).__name__}"
        LOG.warn(kind, f"tier {self.name}: {operation} failed: {cause}")
        event = Failed(tier=self.name, operation=operation, reason=reason, cause=cause)
        self._observers.tell(event)
        breaker.failed(f"{operation}: {cause}", at_once=reason == Reason.DEADLINE)
        return reason

    def _culprit(self, error: Exception) -> str:
        method = error.method if isinstance(error, contract.BrokenContractError) else ""
        return blame.culprit(error, self._kind if self._opened is None else self._opened, method)

    def ping(self) -> None:
        """Return if the store answers; else raise what it raises, or DeadlineExceeded."""
        transfer = Transfer(self.deadline)
        self._workers.call(partial(self._connect, transfer), transfer)

    def state_changed(self, path: Path) -> Callable[[State, str], None]:
        """Who is to hear that a path, such as "reads", is bypassed or in use again."""

        def changed(state: State, cause: str) -> None:
            text = f"tier {self.name}: {path} are {state}: {cause}"
            LOG.warn(f"{self.name} {path} {state}", text)
            kind = Bypassed if state == State.BYPASSED else InUse
            self._observers.tell(kind(tier=self.name, path=path, cause=masked(cause)))

        return changed

    def flush(self, timeout: float | None) -> bool:
        """Wait until what was taken is stored or dropped; False where that takes longer."""
        return self._writer.flush(timeout)

    def refuse(self) -> None:
        """Take no more chunks."""
        self._refuses = True
        self._writer.refuse()

    def drain(self, timeout: float) -> None:
        """Store what was taken; drop what that takes longer for."""
        self._writer.close(timeout)

    def close(self, seconds: float | None = None) -> None:
        """Release everything within so many seconds, by default the deadline. What hangs is left
        behind."""
        end = time.monotonic() + (self.deadline if seconds is None else seconds)
        self._writer.close(0.0)
        self._reads.close()
        self._writes.close()
        self._closed = True
        try:
            if self._opened is not None:
                backend = self._opened
                left = max(JOIN_SECONDS, end - time.monotonic())
                self._work(lambda transfer: backend.close(), left)
        except Exception as error:
            self._failed(self._writes, "close", error)
        join = JOIN_SECONDS
        if process.ends():
            self._codecs.wait(process.EXIT_SECONDS)
            join = EXIT_JOIN_SECONDS
        for threads in (self._workers, self._readers, self._encoders):
            threads.close(max(join, end - time.monotonic()))


def _on_this_thread(work: Callable[[], T]) -> T:
    """What `work` returns, where no thread of ours is between somebody's code and the engine."""
    try:
        return work()
    except BaseException as error:
        raise contract.failure(error) from None
