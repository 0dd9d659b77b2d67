"""CacheEngine: from tokens to tiers and back. This is what an inference engine talks to."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from lmcache_core.backend import Hint
from lmcache_core.config.loading import load
from lmcache_core.config.models import Config, TierConfig
from lmcache_core.engine import contents, removal
from lmcache_core.engine.contents import Contents
from lmcache_core.engine.hit import Hit, TierInfo
from lmcache_core.engine.load_gate import LoadGate
from lmcache_core.engine.prefetch import Prefetch, Prefetcher, Requests
from lmcache_core.engine.removal import Removal, Selection
from lmcache_core.engine.tier import Miss, Tier
from lmcache_core.errors import ConfigError
from lmcache_core.io import process
from lmcache_core.io.breaker import State
from lmcache_core.io.calls import Calls
from lmcache_core.io.memory import HOST
from lmcache_core.io.threads import start_thread
from lmcache_core.kv import filling
from lmcache_core.kv.chunk import Chunk
from lmcache_core.kv.keys import ChunkKey, TokenIds
from lmcache_core.kv.layout import KVLayout, Tensors, TensorSpec
from lmcache_core.kv.namespace import Namespace
from lmcache_core.kv.tensors import views
from lmcache_core.plugins.blame import cause
from lmcache_core.plugins.events import Missed, Reason, by_namespace
from lmcache_core.plugins.log import LOG, log
from lmcache_core.plugins.observers import Observers
from lmcache_core.plugins.options import Bounded
from lmcache_core.plugins.registry import component

DRAIN_SECONDS = 30.0
"""How long `close` waits for write-behind."""

CLEAR_SECONDS = 60.0
"""How long `clear` waits for a store that has much to remove."""

_HEADER_BYTES = 4096
"""More than the head of a frame takes, of a namespace with few layer groups."""

Gather = Callable[[int, Tensors], None]
"""(index, out): copy chunk `index` of the sequence out of the engine's memory into `out`."""


class CacheEngine:
    """Tiers of stored KV, fastest first. Thread-safe; a context manager.

    No method raises for what a store does or fails to do. `load_gate` hears from a connector how
    long it computes and loads; a tier from which loading does not pay is not looked into for a
    while, unless it is memory or the config says `load: always`.

    In a forked child an engine opens its tiers anew when it is first used.
    """

    def __init__(self, config: Config, plugins: Sequence[object] = ()) -> None:
        """Open all tiers. Raises ConfigError where one cannot be used at all."""
        self.chunk_size = config.chunk_size
        self._config, self._plugins = config, plugins
        self._exact: set[object] = set()
        """Code of gathers that fill all through `copy_exact`, as far as it is known."""
        self._opening = process.freed_in_children(threading.Lock())
        self._opened: _Opened | None = None
        self._closed = False
        process.tell_children(self)
        self._opened = _Opened(config, plugins)
        self._finalizer = weakref.finalize(self, _close, self._opened)

    def __repr__(self) -> str:
        return f"<CacheEngine: {self.chunk_size} tokens a chunk, {self._opened!r}>"

    # Of this process

    def in_child(self) -> None:
        """Let go of the parent's tiers, whose threads and connections are not here."""
        if self._opened is not None:
            process.keep(self._opened)
            self._finalizer.detach()
            self._opened = None

    @property
    def _here(self) -> _Opened:
        """What this process has opened; a forked child does that when it first needs it."""
        return self._opened or self._open_again()

    def _open_again(self) -> _Opened:
        with self._opening:
            if self._opened is None:
                self._opened = self._inherit()
                self._finalizer = weakref.finalize(self, _close, self._opened)
            return self._opened

    def _inherit(self) -> _Opened:
        """The same tiers, opened by this process; none where that fails, or it is too late."""
        config = self._config.model_copy(update={"strict": False})
        nothing = config.model_copy(update={"tiers": ()})
        if self._closed:
            return _Opened(nothing)
        try:
            opened = _Opened(config, self._plugins)
        except BaseException as error:  # nobody who looks up or stores expects one
            log.warning("in a forked child nothing is cached: %s", cause(error))
            return _Opened(nothing)
        private = [each.name for each in config.tiers if each.backend_class.locality == "process"]
        if private:
            log.warning(
                "in a forked child %s begins empty, beside its parent's; shm is one for all",
                " and ".join(private),
            )
        return opened

    @property
    def _tiers(self) -> list[Tier]:
        return self._here.tiers

    @property
    def _observers(self) -> Observers:
        return self._here.observers

    @property
    def load_gate(self) -> LoadGate:
        """Whether loading from a tier pays; a connector tells it how long it computes and loads."""
        return self._here.load_gate

    def namespace(self, **fields: Any) -> Namespace:
        """A Namespace of these fields, with what plugins add to it.

        Raises ConfigError where a plugin fails to tell what it adds, or where a tier is too small
        for one chunk of its layout.
        """
        extra: dict[str, str] = dict(fields.pop("extra", {}))
        self._observers.add_to_namespace(extra, fields)
        namespace = Namespace(**fields, extra=extra)
        self._check_capacities(namespace)
        return namespace

    def warm(self, layouts: Sequence[KVLayout]) -> None:
        """Have memory ready, soon, for frames of chunks of these, which a process's first load
        would wait for. Nothing is done where all tiers are memory."""
        if all(tier.in_memory for tier in self._tiers):
            return
        chunks = [each.bytes_per_token * self.chunk_size for each in layouts]
        sizes = [nbytes + _HEADER_BYTES for nbytes in chunks]
        with contextlib.suppress(RuntimeError):  # no thread can be had
            start_thread(partial(HOST.warm, sizes), "lmcache-warm")

    def _check_capacities(self, namespace: Namespace) -> None:
        for tier, config in zip(self._tiers, self._config.tiers, strict=False):
            if not isinstance(config.options, Bounded):
                continue
            capacity, sized = config.options.capacity, tier.raw_bytes(namespace, self.chunk_size)
            needed = config.options.bytes_for(sized)
            if capacity < needed and all(serde.name == "raw" for serde in config.serde):
                raise ConfigError(
                    f"{config.where}.capacity: {capacity} bytes hold no chunk; for this model "
                    f"{self.chunk_size} tokens take {needed} bytes, with the head of their frame"
                )

    def keys(self, namespace: Namespace, token_ids: TokenIds) -> list[ChunkKey]:
        """One key for each full chunk of `token_ids`, root first."""
        return namespace.keys(token_ids, self.chunk_size)

    def lookup(self, keys: Sequence[ChunkKey]) -> Hit:
        """The longest prefix of `keys` that is stored, over the union of all tiers.

        Takes at most one deadline for each tier that does not answer.
        """
        where, failed = self._find(keys)
        end = where.index(None) if None in where else len(keys)
        self._count_misses(keys[end:], where[end:], failed)
        return Hit(tuple(keys), tuple(n for n in where[:end] if n is not None))

    def locate(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        """For each of `keys`, which need not be one sequence, the number of the fastest tier that
        has it. For engines that make a Hit of their own; only a tier that fails counts misses.

        Takes at most one deadline for each tier that does not answer.
        """
        where, failed = self._find(keys)
        if failed:
            nowhere = [key for key, number in zip(keys, where, strict=True) if number is None]
            for some in by_namespace(nowhere):
                self._missed(some, *failed)
        return where

    @property
    def tiers(self) -> tuple[TierInfo, ...]:
        """What a tier's number stands for."""
        return tuple(
            TierInfo(tier.name, config.backend, tier.in_memory, config.backend_class.medium)
            for tier, config in zip(self._tiers, self._config.tiers, strict=False)
        )

    @property
    def stores(self) -> tuple[Tier, ...]:
        """The tiers themselves, for tools and tests; no engine needs them."""
        return tuple(self._tiers)

    def bypassed(self, tier: int) -> bool:
        """Whether a tier is not looked into for now: it failed, or loading from it does not pay."""
        if tier >= len(self._tiers):  # in a forked child that could not open them
            return True
        return self._tiers[tier].bypassed or not self.load_gate.allows(tier)

    def _find(
        self, keys: Sequence[ChunkKey], first: int = 0
    ) -> tuple[list[int | None], _Failed | None]:
        """For each key the fastest tier, from `first` on, that has it; and a tier that could not
        tell, if any."""
        where: list[int | None] = [None] * len(keys)
        failed: _Failed | None = None
        unknown = list(range(len(keys)))
        for number, tier in enumerate(self._tiers[first:], first):
            if not unknown:
                break
            if not self.load_gate.allows(number):
                failed = _Failed(tier.name, Reason.SLOW)
                continue
            present, reason = tier.contains([keys[i] for i in unknown])
            for i, there in zip(unknown, present, strict=True):
                if there:
                    where[i] = number
            unknown = [i for i in unknown if where[i] is None]
            failed = _Failed(tier.name, reason) if reason else failed
        return where, failed

    def _count_misses(
        self,
        keys: Sequence[ChunkKey],
        where: Sequence[int | None],
        failed: _Failed | None,
    ) -> None:
        """Count what lies behind the end of a prefix: not there, or there behind a hole."""
        nowhere = [key for key, number in zip(keys, where, strict=True) if number is None]
        behind = [key for key, number in zip(keys, where, strict=True) if number is not None]
        self._missed(nowhere, *(failed or ("", Reason.ABSENT)))
        self._missed(behind, "", Reason.HOLE)

    def _missed(self, keys: Sequence[ChunkKey], tier: str, reason: Reason) -> None:
        if keys:
            self._observers.tell(Missed(tier=tier, keys=tuple(keys), reason=reason))

    def load(
        self, what: Hit | Sequence[ChunkKey], start: int = 0, *, shared: bool = False
    ) -> Iterator[Chunk]:
        """Yield the stored prefix, chunk by chunk from `start`, each as soon as it is there.

        Ends early where a chunk fails to come; what was yielded is whole. Chunks are the caller's
        own. With `shared`, which saves a copy, they may be a memory tier's: who asks for it copies
        their tensors, and neither keeps nor changes them. Chunks found in a store that is not
        memory are promoted to the tiers above it.
        """
        opened = self._here
        chunks = self._chunks(what, start, shared)
        try:
            while opened is self._opened:
                with opened.calls:
                    chunk = None if opened.closed else next(chunks, None)
                if chunk is None:
                    break
                yield chunk
                del chunk
        finally:
            if opened is self._opened:
                with opened.calls:
                    chunks.close()
            else:  # this is a forked child, and the rest the parent's
                process.keep(chunks)

    def _chunks(
        self, what: Hit | Sequence[ChunkKey], start: int, shared: bool
    ) -> Generator[Chunk, None, None]:
        hit = what if isinstance(what, Hit) else self.lookup(what)
        done = start
        request = self._here.requests.begin()
        try:
            for chunk, number in self._arriving(hit, start):
                done += 1
                if not shared and (len(self._tiers) > 1 or self._tiers[number].keeps(chunk)):
                    chunk = _own(chunk)
                yield chunk
                del chunk
        finally:
            request.end()
            for tier in self._tiers if done > start else ():
                tier.used(hit.keys[:done])

    def _arriving(self, hit: Hit, start: int) -> Iterator[tuple[Chunk, int]]:
        """Chunks from `start` on and their tiers, stored in the tiers above these."""
        # A Hit may be of another process, which had other tiers.
        where = list(takewhile(lambda number: number < len(self._tiers), hit.tiers))
        keys = hit.keys[: len(where)]
        loaded, stored = _Tally(), _Tally()
        full: set[int] = set()
        done = start
        try:
            while done < len(where):
                for chunk, number in self._stream(keys, where, done, loaded):
                    done += 1
                    self._spread(chunk, keys, number, full, stored)
                    yield chunk, number
                    del chunk
                if done < len(where):
                    where[done:] = self._find_again(keys, where, done)
        finally:
            loaded.tell(Tier.tell_loaded)
            stored.tell(Tier.tell_stored)

    def prefetch(self, keys: Sequence[ChunkKey]) -> Prefetch:
        """Bring the stored prefix of `keys` into the tiers before the one that has it, in the
        background and behind the loads of requests. May be cancelled."""
        return self._here.prefetcher.add(keys, self._promote)

    def _promote(self, keys: Sequence[ChunkKey]) -> Iterator[int]:
        """Yield the length of the prefix that the fastest tier has, as it grows."""
        hit = self.lookup(keys)
        start = next((i for i, tier in enumerate(hit.tiers) if tier), hit.chunks)
        yield start
        for done, _ in enumerate(self._arriving(hit, start), start + 1):
            yield done

    def _stream(
        self, keys: Sequence[ChunkKey], where: Sequence[int], start: int, loaded: _Tally
    ) -> Iterator[tuple[Chunk, int]]:
        """Chunks from `start` on and their tiers, as far as each tier has what it should have."""
        arrivals: dict[int, _Arrivals] = {}
        try:
            for index in range(start, len(where)):
                number = where[index]
                if number not in arrivals:
                    mine = [i for i in range(index, len(where)) if where[i] == number]
                    arrivals[number] = _Arrivals(self._tiers[number], keys, mine)
                begin = time.monotonic()
                got = arrivals[number].take(index)
                if isinstance(got, Miss):
                    return
                if got.index != index:  # as the frame says, which may be a stranger's
                    got = dataclasses.replace(got, index=index)
                loaded.add(self._tiers[number], got, time.monotonic() - begin)
                yield got, number
                del got
        finally:
            for arrival in arrivals.values():
                arrival.close()

    def _find_again(self, keys: Sequence[ChunkKey], where: Sequence[int], start: int) -> list[int]:
        """Where the rest is, after chunk `start` did not come from its tier: nowhere faster."""
        found, _ = self._find([keys[start]], where[start] + 1)
        if found[0] is None:
            return []
        rest, _ = self._find(keys[start + 1 :])
        end = rest.index(None) if None in rest else len(rest)
        return [found[0], *(n for n in rest[:end] if n is not None)]

    def _spread(
        self,
        chunk: Chunk,
        keys: tuple[ChunkKey, ...],
        source: int,
        full: set[int],
        stored: _Tally,
    ) -> None:
        """Promote a chunk to the tiers above its source, as far as each takes the sequence, and
        offer it again to one below that had to drop it."""
        # Of memory, a chunk is a view: kept, it would hold a slot of a pool that others share.
        from_memory = self._tiers[source].in_memory
        for number, tier in enumerate(self._tiers):
            promote = number < source and number not in full and not from_memory
            if promote or (number > source and tier.lacks(chunk.key)):
                begin = time.monotonic()
                reason = self._offer(number, chunk, keys, source)
                if reason:
                    full.add(number)
                    tier.drop([chunk.key], reason)
                elif tier.in_memory:
                    stored.add(tier, chunk, time.monotonic() - begin)

    def store(
        self,
        namespace: Namespace,
        keys: Sequence[ChunkKey],
        gather: Gather,
        *,
        start: int = 0,
        tokens: int | None = None,
    ) -> int:
        """Store chunks `start` .. of a sequence; returns how many the first tier took.

        `keys` is the whole sequence from its root. `gather` is called once for each chunk that is
        new (a memory tier in front knows), with host tensors of `namespace.layout` for `tokens`
        (default `chunk_size`) tokens to fill; `copy_exact` fills them safely. Only that copy
        happens on the caller's thread, besides storing in memory; slower tiers are written behind.
        Whatever `gather` raises comes through; chunks before it are stored. Where it leaves a part
        of a chunk unfilled that is found, and the rest of the sequence is dropped, or zero; it may
        be called again for a chunk to find out.
        """
        if any(key.namespace != namespace.digest for key in keys):
            raise ValueError("keys of another namespace")
        tokens = self.chunk_size if tokens is None else tokens
        if not 0 < tokens <= self.chunk_size:
            raise ValueError(f"{tokens} tokens; a chunk has 1 to {self.chunk_size}")
        opened = self._here
        with opened.calls:
            if opened.closed:
                return 0
            return self._store(namespace, tuple(keys), gather, start, tokens)

    def _store(
        self,
        namespace: Namespace,
        keys: tuple[ChunkKey, ...],
        gather: Gather,
        start: int,
        tokens: int,
    ) -> int:
        new = self._new(keys, start)
        stored = _Tally()
        taken = [0] * len(self._tiers)
        refused: list[Reason | None] = [None] * len(self._tiers)
        try:
            for index in new:
                if all(refused):
                    break  # nobody takes it: do not even gather it
                first = None if refused[0] else self._tiers[0]
                chunk = self._gather(namespace, keys, index, tokens, gather, first)
                for n, tier in enumerate(self._tiers):
                    begin = time.monotonic()
                    refused[n] = refused[n] or self._offer(n, chunk, keys)
                    taken[n] += not refused[n]
                    if chunk and tier.in_memory and not refused[n]:
                        stored.add(tier, chunk, time.monotonic() - begin)
        finally:
            stored.tell(Tier.tell_stored)
            for tier, count, reason in zip(self._tiers, taken, refused, strict=True):
                if tier.in_memory and count:
                    tier.touch(keys[: new[count - 1] + 1])
                if reason:
                    tier.drop([keys[index] for index in new[count:]], reason)
        return taken[0] if taken else 0

    def _offer(
        self, number: int, chunk: Chunk | None, keys: tuple[ChunkKey, ...], source: int = 0
    ) -> Reason | None:
        """Why a tier does not take a chunk; None where it does. What lies in memory of `source`
        that others share is copied for another memory: kept there, it could never be evicted."""
        if chunk is None:
            return Reason.UNFILLED
        if number != source and self._tiers[number].in_memory and self._tiers[source].lends:
            chunk = _own(chunk)
        return self._tiers[number].store(chunk, keys)

    def _gather(
        self,
        namespace: Namespace,
        keys: tuple[ChunkKey, ...],
        index: int,
        tokens: int,
        gather: Gather,
        tier: Tier | None,
    ) -> Chunk | None:
        """Chunk `index`, in memory of the tier's own where it has some, filled by `gather`; None
        where that left a part of it as it was."""
        specs = namespace.layout.tensors(tokens)
        nbytes = sum(spec.nbytes for spec in specs)
        room = HOST.allocate(nbytes) if tier is None else tier.reserve(nbytes, keys)
        if filling.is_whole(gather):
            gather(index, views([room], specs))
            return Chunk(keys[index], namespace, index, tokens, views([room], specs))
        name = getattr(gather, "__qualname__", type(gather).__qualname__)
        loan = filling.Loan(room)
        if not self._filled(gather, index, views([loan.memory], specs)):
            LOG.warn(f"unfilled {name}", f"store: {name} left a part of chunk {index} unfilled")
            return None
        chunk = Chunk(keys[index], namespace, index, tokens, views([room], specs))
        if loan.is_back():
            return chunk
        LOG.warn(f"keeps {name}", f"store: {name} keeps tensors that it was given; they are copied")
        return _own(chunk)

    def _filled(self, gather: Gather, index: int, tensors: Tensors) -> bool:
        """Have `gather` fill tensors. What it leaves is found or zero, never what was there."""
        code = getattr(gather, "__code__", type(gather))
        if code in self._exact:
            with filling.Filling(tensors) as seen:
                gather(index, dict(tensors))
            if seen.whole:
                return True
            self._exact.discard(code)
        filling.clear(tensors)
        with filling.Filling(tensors) as seen:
            gather(index, dict(tensors))
        if seen.whole:
            self._exact.add(code)
        return not filling.left(tensors)

    def _new(self, keys: Sequence[ChunkKey], start: int) -> list[int]:
        """Which chunks to gather: all that a memory tier in front does not have."""
        indices = list(range(start, len(keys)))
        if not self._tiers or not self._tiers[0].in_memory:
            return indices
        present, _ = self._tiers[0].contains(keys[start:])
        return [i for i, there in zip(indices, present, strict=True) if not there]

    def hint(self, keys: Sequence[ChunkKey], hint: Hint) -> None:
        """Tell what nobody but the caller knows of a sequence: its chat is over ("done"), its chat
        waits for a tool and goes on soon ("waiting"), or it is a batch job's and comes no more
        ("once").

        A full store lets go first of what is over, as far as no other sequence shares it. A wrong
        hint costs a miss.
        """
        for tier in self._tiers:
            tier.hint(tuple(keys), hint)

    def invalidate(self, keys: Sequence[ChunkKey]) -> Removal:
        """Remove these chunks from every tier, with what waits to be written of them.

        Chunks that follow them in longer sequences stay, are found no more, and leave when room is
        made. Costs at most two deadlines a tier; a tier that does not answer is named.
        """
        return removal.remove(self._tiers, keys, None)

    def clear(
        self,
        *,
        namespace: Namespace | None = None,
        model: str | None = None,
        tenant: str | None = None,
        timeout: float = CLEAR_SECONDS,
    ) -> Removal:
        """Remove from every tier all chunks of a namespace, of a model's name, of a tenant, of a
        tenant's model; without any of these all there is, what cannot be read included.

        Other processes may go on storing meanwhile. `timeout`: seconds that each tier may take.
        """
        selection = Selection(namespace, model, tenant)
        return removal.clear(self._tiers, selection, timeout)

    def contents(self, timeout: float = CLEAR_SECONDS) -> Contents:
        """What each tier holds, by namespace: chunks, and bytes as they lie there.

        Asks each store for all its keys, for at most `timeout` seconds, and one chunk of each
        namespace whose it is.
        """
        return contents.contents(self._tiers, timeout)

    def stats(self) -> dict[tuple[str, ...], float]:
        """Counts by (name, labels ...), such as ("loaded", "disk") or ("missed", "damaged",
        "disk"): chunks or, where the name says so, bytes or seconds. See docs/metrics.md."""
        return self._opened.observers.counters.snapshot() if self._opened else {}

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was taken is stored or dropped; False where it takes longer."""
        end = None if timeout is None else time.monotonic() + timeout
        return all(
            tier.flush(None if end is None else max(0.0, end - time.monotonic()))
            for tier in (self._opened.tiers if self._opened else ())
        )

    def close(self) -> None:
        """Write what was promised (for up to DRAIN_SECONDS), then release everything.

        A closed engine finds nothing and stores nothing. One that is dropped without it is closed
        then, or when the interpreter exits.
        """
        self._closed = True
        if self._opened is not None:
            self._finalizer()

    def __enter__(self) -> CacheEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Failed(NamedTuple):
    """A tier that could not tell what it has."""

    tier: str
    reason: Reason


class _Arrivals:
    """One tier's part of a load, put into the order of the sequence."""

    def __init__(self, tier: Tier, keys: Sequence[ChunkKey], indices: Sequence[int]) -> None:
        self._indices = indices
        self._waiting: dict[int, Chunk | Miss] = {}
        self._stream = tier.fetch([keys[i] for i in indices])

    def take(self, index: int) -> Chunk | Miss:
        while index not in self._waiting:
            place, got = next(self._stream)
            self._waiting[self._indices[place]] = got
        return self._waiting.pop(index)

    def close(self) -> None:
        self._stream.close()


class _Moved(NamedTuple):
    """Chunks that one call moved from or to a tier, their sizes, and seconds that it took."""

    keys: list[ChunkKey]
    sizes: list[int]
    seconds: list[float]


class _Tally:
    """What one call moved, so that each tier tells of it once."""

    def __init__(self) -> None:
        self._moved: dict[Tier, _Moved] = {}

    def add(self, tier: Tier, chunk: Chunk, seconds: float) -> None:
        keys, sizes, times = self._moved.setdefault(tier, _Moved([], [], []))
        keys.append(chunk.key)
        sizes.append(chunk.nbytes)
        times.append(seconds)

    def tell(self, tell: Callable[[Tier, Sequence[ChunkKey], int, float], None]) -> None:
        for tier, (keys, sizes, seconds) in self._moved.items():
            tell(tier, keys, sum(sizes), sum(seconds))


def _own(chunk: Chunk) -> Chunk:
    """The same in memory of its own."""
    specs = [TensorSpec.of(name, tensor) for name, tensor in chunk.tensors.items()]
    copies = views([HOST.allocate(chunk.nbytes)], specs)
    for name, tensor in chunk.tensors.items():
        copies[name].copy_(tensor)
    return dataclasses.replace(chunk, tensors=copies)


def _open_tier(config: TierConfig, observers: Observers, whole: Config) -> Tier:
    try:
        kind = component("backends", config.backend)
    except BaseException as error:  # a plugin's import may raise any, SystemExit included
        raise ConfigError(f"{config.where}: {cause(error)}") from error
    return Tier(config, kind, observers, whole.chunk_size, strict=whole.strict)


class _Opened:
    """What an engine has of one process: threads, connections, locks."""

    def __init__(self, config: Config, plugins: Sequence[object] = ()) -> None:
        """Raises ConfigError where a tier or a plugin cannot be used at all."""
        self.observers = Observers(plugins)
        self.tiers: list[Tier] = []
        self.calls = Calls()
        """Who copies chunks just now: threads of our callers, whom nobody else would wait for."""
        self.requests = Requests()
        self.prefetcher = Prefetcher(self.requests)
        self.closed = False
        try:
            for tier in config.tiers:
                self.tiers.append(_open_tier(tier, self.observers, config))
        except BaseException:
            self.close()
            raise
        judged = [config.load != "always" and not tier.in_memory for tier in self.tiers]
        self.load_gate = LoadGate(judged, self._judged)

    def __repr__(self) -> str:
        return repr(self.tiers)

    def _judged(self, number: int, state: State, cause: str) -> None:
        self.tiers[number].state_changed("loads")(state, cause)

    def close(self) -> None:
        """Write what was promised, for up to DRAIN_SECONDS, and release everything, within a
        deadline in all where a store hangs."""
        self.closed = True
        began = time.monotonic()
        self.prefetcher.close()
        for tier in self.tiers:
            tier.refuse()
        end = time.monotonic() + DRAIN_SECONDS
        for tier in self.tiers:  # they write beside each other
            tier.drain(max(0.0, end - time.monotonic()))
        for tier in self.tiers:
            tier.close(max(0.0, began + tier.deadline - time.monotonic()))
        self.observers.close()


def _close(opened: _Opened) -> None:
    """Close all tiers, from whichever thread and at whichever moment.

    A signal's handler or a finalizer may run in the middle of a call of ours, which may hold what
    the writers wait for. Then another thread closes, and this one waits for no longer than a
    deadline; the interpreter's end waits for the rest.
    """
    if process.ends():
        opened.close()
        opened.calls.wait(process.EXIT_SECONDS)
        return HOST.end(process.EXIT_SECONDS)
    if not _is_inside():
        return opened.close()
    thread = start_thread(opened.close, "lmcache-close")
    thread.join(max((tier.deadline for tier in opened.tiers), default=0.0))
    if thread.is_alive():
        atexit.register(thread.join, DRAIN_SECONDS)


_ROOMS = tuple(f"lmcache_core.{room}" for room in ("engine", "frames", "plugins", "kv", "io"))
_ROOMS += ("lmcache_backends.", "lmcache_serde.")


def _is_inside() -> bool:
    """Whether this thread is in the middle of a call of ours, other than the one that closes."""
    frame: FrameType | None = sys._getframe(2)  # who called what calls this
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        closes = frame.f_code.co_name in ("close", "__exit__") and name == __name__
        if name.startswith(_ROOMS) and not closes:
            return True
        frame = frame.f_back
    return False


def open(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    plugins: Sequence[object] = (),
) -> CacheEngine:
    """A ready engine from a YAML file, a mapping, a Config, or (None) the environment.

    `plugins`: objects with hooks (`lmcache_core.hookimpl`) for this engine. Raises ConfigError.
    """
    return CacheEngine(load(config), plugins)
