"""CacheEngine: from tokens to tiers and back. This is what an inference engine talks to."""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from lmcache_core.components import component
from lmcache_core.config import Config, load
from lmcache_core.errors import ConfigError
from lmcache_core.frame import Chunk
from lmcache_core.keys import ChunkKey, Namespace, TokenIds
from lmcache_core.layout import Tensors, views
from lmcache_core.memory import HOST
from lmcache_core.observers import LOG, Observers
from lmcache_core.tier import Miss, Tier

DRAIN_SECONDS = 30.0
"""How long `close` waits for write-behind."""

Gather = Callable[[int, Tensors], None]
"""(index, out): copy chunk `index` of the sequence out of the engine's memory into `out`."""


class Hit(NamedTuple):
    """What a lookup found."""

    keys: tuple[ChunkKey, ...]
    """The sequence that was asked for, root first."""
    tiers: tuple[int, ...]
    """For each chunk of the longest stored prefix, the number of the fastest tier that has it."""

    @property
    def chunks(self) -> int:
        """Length of that prefix in chunks."""
        return len(self.tiers)


class CacheEngine:
    """Tiers of stored KV, fastest first. Thread-safe; a context manager.

    No method raises for what a store does or fails to do.
    """

    def __init__(self, config: Config, plugins: Sequence[object] = ()) -> None:
        """Open all tiers. Raises ConfigError where one cannot be used at all."""
        self.chunk_size = config.chunk_size
        self._observers = Observers(plugins)
        self._tiers: list[Tier] = []
        self._closed = False
        try:
            for number, tier in enumerate(config.tiers):
                self._tiers.append(_open_tier(number, tier, self._observers))
        except BaseException:
            self.close()
            raise
        self._exit = _close_at_exit(self)

    def namespace(self, **fields: Any) -> Namespace:
        """A Namespace of these fields, with what plugins add to it."""
        extra: dict[str, str] = dict(fields.pop("extra", {}))
        for more in self._observers.tell("namespace", fields=fields):
            extra.update(more)
        return Namespace(**fields, extra=extra)

    def keys(self, namespace: Namespace, token_ids: TokenIds) -> list[ChunkKey]:
        """One key for each full chunk of `token_ids`, root first."""
        return namespace.keys(token_ids, self.chunk_size)

    def lookup(self, keys: Sequence[ChunkKey]) -> Hit:
        """The longest prefix of `keys` that is stored, over the union of all tiers.

        Takes at most one deadline for each tier that does not answer.
        """
        where: list[int | None] = [None] * len(keys)
        unknown = list(range(len(keys)))
        for number, tier in enumerate(self._tiers):
            if not unknown:
                break
            present = tier.contains([keys[i] for i in unknown])
            for i, there in zip(unknown, present, strict=True):
                if there:
                    where[i] = number
            unknown = [i for i in unknown if where[i] is None]
        end = unknown[0] if unknown else len(keys)
        if end < len(keys):
            self._observers.tell("missed", tier="", reason="absent", keys=keys[end:])
        return Hit(tuple(keys), tuple(n for n in where[:end] if n is not None))

    def load(self, what: Hit | Sequence[ChunkKey]) -> Iterator[Chunk]:
        """Yield the stored prefix, chunk by chunk from the root, each as soon as it is there.

        Ends early where a chunk fails to come; what was yielded is whole. Chunks are shared with
        the memory tier: copy their tensors, never keep or change them. Chunks found in a slow tier
        are promoted to the faster ones.
        """
        hit = what if isinstance(what, Hit) else self.lookup(what)
        loaded = 0
        arrivals = [_Arrivals(tier, number, hit) for number, tier in enumerate(self._tiers)]
        full: set[int] = set()
        try:
            for index, number in enumerate(hit.tiers):
                got = self._take(arrivals, number, index, hit.keys[index])
                if got is None:
                    break
                chunk, source = got
                loaded += 1
                self._promote(chunk, hit.keys[: index + 1], source, full)
                yield chunk
                del chunk, got
        finally:
            for arrival in arrivals:
                arrival.close()
            if loaded:
                for tier in self._tiers:
                    tier.touch(hit.keys[:loaded])

    def _take(
        self, arrivals: list[_Arrivals], number: int, index: int, key: ChunkKey
    ) -> tuple[Chunk, int] | None:
        """A chunk from the tier that should have it, else from a slower one that does."""
        got = arrivals[number].take(index)
        source = number
        while isinstance(got, Miss):
            self._observers.tell(
                "missed", tier=self._tiers[source].name, reason=got.reason, keys=[key]
            )
            source += 1
            if source == len(self._tiers):
                return None
            if self._tiers[source].contains([key])[0]:
                got = next(iter(self._tiers[source].fetch([key])))[1]
            else:
                got = Miss("absent")
        self._observers.tell(
            "loaded", tier=self._tiers[source].name, keys=[key], nbytes=got.nbytes
        )
        return got, source

    def _promote(
        self, chunk: Chunk, chain: Sequence[ChunkKey], source: int, full: set[int]
    ) -> None:
        """Store a chunk in the tiers above its source, as far as a tier takes the sequence."""
        for number in range(source):
            if number not in full and self._tiers[number].store([chunk], chain) == 0:
                full.add(number)

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

        `keys` is the whole sequence from its root. `gather` is called once for each chunk that
        the first tier does not have yet, with host tensors of `namespace.layout` for `tokens`
        (default `chunk_size`) tokens to fill. Only that copy happens on the caller's thread,
        besides storing in memory; slower tiers are written behind. Whatever `gather` raises
        comes through; chunks before it are stored.
        """
        if any(key.namespace != namespace.digest for key in keys):
            raise ValueError("keys of another namespace")
        tokens = self.chunk_size if tokens is None else tokens
        new = self._new(keys, start)
        chunks: list[Chunk] = []
        try:
            for index in new:
                chunks.append(_gather(namespace, keys[index], index, tokens, gather))
        finally:
            taken = [self._offer(tier, chunks, keys) for tier in self._tiers]
        return taken[0]

    def _new(self, keys: Sequence[ChunkKey], start: int) -> list[int]:
        """Which chunks to gather: all that a memory tier in front does not have."""
        indices = list(range(start, len(keys)))
        if not self._tiers[0].in_memory:
            return indices
        present = self._tiers[0].contains(keys[start:])
        return [i for i, there in zip(indices, present, strict=True) if not there]

    def _offer(self, tier: Tier, chunks: Sequence[Chunk], keys: Sequence[ChunkKey]) -> int:
        return tier.store(chunks, keys[: chunks[-1].index + 1]) if chunks else 0

    def stats(self) -> dict[tuple[str, ...], int]:
        """Counts by (event, labels ...), such as ("loaded", "disk") or
        ("missed", "damaged", "disk"), in chunks or, where the event says so, bytes."""
        return self._observers.counters.snapshot()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was taken is stored or dropped; False where it takes longer."""
        end = None if timeout is None else time.monotonic() + timeout
        return all(
            tier.flush(None if end is None else max(0.0, end - time.monotonic()))
            for tier in self._tiers
        )

    def close(self) -> None:
        """Write what was promised (for up to DRAIN_SECONDS), then release everything."""
        if self._closed:
            return
        self._closed = True
        if hasattr(self, "_exit"):
            atexit.unregister(self._exit)
        for tier in self._tiers:
            tier.close(DRAIN_SECONDS)

    def __enter__(self) -> CacheEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Arrivals:
    """One tier's part of a load: started when first needed, then kept in prefix order."""

    def __init__(self, tier: Tier, number: int, hit: Hit) -> None:
        self._tier, self._hit = tier, hit
        self._indices = [i for i, n in enumerate(hit.tiers) if n == number]
        self._waiting: dict[int, Chunk | Miss] = {}
        self._stream: Iterator[tuple[int, Chunk | Miss]] | None = None

    def take(self, index: int) -> Chunk | Miss:
        if self._stream is None:
            self._stream = self._tier.fetch([self._hit.keys[i] for i in self._indices])
        while index not in self._waiting:
            place, got = next(self._stream)
            self._waiting[self._indices[place]] = got
        return self._waiting.pop(index)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]


def _gather(
    namespace: Namespace, key: ChunkKey, index: int, tokens: int, gather: Gather
) -> Chunk:
    specs = namespace.layout.tensors(tokens)
    tensors = views(HOST.allocate(sum(spec.nbytes for spec in specs)), specs)
    gather(index, tensors)
    return Chunk(key, namespace, index, tokens, tensors)


def _open_tier(number: int, config: Any, observers: Observers) -> Tier:
    try:
        backend = component("backends", config.backend)(config.options)
    except ConfigError as error:
        raise ConfigError(f"{config.where or f'tiers[{number}]'}: {error}") from error
    return Tier(config, backend, observers)


def _close_at_exit(engine: CacheEngine) -> Callable[[], None]:
    """An engine that nobody closes still keeps its promises when the interpreter exits."""
    reference = weakref.ref(engine)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.close()

    atexit.register(close)
    return close


def open(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    plugins: Sequence[object] = (),
) -> CacheEngine:
    """A ready engine from a YAML file, a mapping, a Config, or (None) the environment.

    `plugins`: objects with hooks (`lmcache_core.hookimpl`) for this engine. Raises ConfigError.
    """
    return CacheEngine(load(config), plugins)
