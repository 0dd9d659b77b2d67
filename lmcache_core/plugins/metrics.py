"""Metrics: the one table of what is counted of events, here, by Prometheus and in vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from lmcache_core.plugins.events import (
    Bypassed,
    ChunkEvent,
    Damaged,
    Dropped,
    Event,
    Evicted,
    Failed,
    InUse,
    Loaded,
    LookedUp,
    Missed,
    PluginFailed,
    Removed,
    Stored,
)

E = TypeVar("E", bound=Event)


class Metric(NamedTuple):
    """A number that grows with each event of a kind. One in seconds is a histogram's as well."""

    name: str
    help: str
    event: type[Event]
    amount: Callable[[Event], float]

    @property
    def counted_as(self) -> str:
        """Its name in `CacheEngine.stats`, where chunks are what is counted if nothing else is
        said."""
        return self.name.removesuffix("_chunks")

    @property
    def labels(self) -> tuple[str, ...]:
        """The event's fields that tell numbers of this name apart."""
        return self.event.labels

    @property
    def in_seconds(self) -> bool:
        """Whether it tells how long something took."""
        return self.name.endswith("_seconds")


def label_values(event: Event) -> tuple[str, ...]:
    """The values of an event's labels."""
    return tuple([str(getattr(event, label)) for label in event.labels])


def _metric(name: str, help: str, event: type[E], amount: Callable[[E], float]) -> Metric:
    return Metric(name, help, event, amount)  # type: ignore[arg-type]  # asked of E only


def _chunks(event: ChunkEvent) -> int:
    return len(event.keys)


def _once(event: Event) -> int:
    return 1


METRICS = (
    _metric("looked_up_chunks", "Chunks that a tier was asked for", LookedUp, lambda e: e.chunks),
    _metric("found_chunks", "Chunks that a tier had", LookedUp, lambda e: e.found),
    _metric("tier_lookup_seconds", "Time that lookups took", LookedUp, lambda e: e.seconds),
    _metric("loaded_chunks", "Chunks loaded", Loaded, _chunks),
    _metric("loaded_bytes", "Bytes of KV loaded", Loaded, lambda e: e.nbytes),
    _metric("tier_load_seconds", "Time that loads waited", Loaded, lambda e: e.seconds),
    _metric("missed_chunks", "Chunks asked for that did not come", Missed, _chunks),
    _metric("stored_chunks", "Chunks stored", Stored, _chunks),
    _metric("stored_bytes", "Bytes of KV stored", Stored, lambda e: e.nbytes),
    _metric("tier_store_seconds", "Time that storing took", Stored, lambda e: e.seconds),
    _metric("dropped_chunks", "Chunks not stored", Dropped, _chunks),
    _metric("evicted_chunks", "Chunks removed to make room", Evicted, _chunks),
    _metric("removed_chunks", "Chunks removed because they were of no use", Removed, _chunks),
    _metric("damaged_chunks", "Chunks that a tier had and nobody could use", Damaged, _chunks),
    _metric("failed", "Calls of stores that failed", Failed, _once),
    _metric("bypassed", "Times that a tier began to be bypassed", Bypassed, _once),
    _metric("in_use", "Times that a tier came back into use", InUse, _once),
    _metric("plugin_failed", "Times that a plugin failed to hear an event", PluginFailed, _once),
)
