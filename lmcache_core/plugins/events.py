"""Events: what happens, as values. metrics.py counts them, plugins hear them (`lmcache_event`).

All chunks of one event are of one namespace. Seconds are wall-clock time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import ClassVar, Literal

from lmcache_core.kv.keys import ChunkKey


class Reason(StrEnum):
    """Why a chunk did not come, or was not stored. What is of no one tier, absent chunks and those
    behind a hole, is told with `tier` ""."""

    ABSENT = "absent"
    """No tier has it."""
    HOLE = "hole"
    """A chunk before it in its sequence is missing."""
    EVICTED = "evicted"
    """It went between lookup and load."""
    DAMAGED = "damaged"
    """Not a whole frame: cut, extended, changed."""
    FOREIGN = "foreign"
    """Another key's frame."""
    UNREADABLE = "unreadable"
    """Another frame version, a serde that is not installed, a key that is not configured, or no
    seal where the tier seals."""
    DEADLINE = "deadline"
    """The store did not answer in time."""
    ERROR = "error"
    """The store failed, or its plugin did."""
    BYPASSED = "bypassed"
    """The store failed before, and is not used for now."""
    SLOW = "slow"
    """Computing is faster, so the store is not loaded from for now."""
    FULL = "full"
    """The store has no room for more of this sequence."""
    QUEUE = "queue"
    """The write-behind queue is over its budget."""
    UNFILLED = "unfilled"
    """The engine's gather left a part of the chunk as it was."""


Operation = Literal["open", "lookup", "load", "store", "touch", "delete", "ping", "close"]
"""What was asked of a store."""

Path = Literal["reads", "writes", "loads"]
"""What of a tier is bypassed: reads or writes that fail, or loads that do not pay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events. `labels` are the fields that a metric tells apart."""

    labels: ClassVar[tuple[str, ...]] = ("tier",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkEvent(Event):
    """Base of events that are of chunks."""

    tier: str
    keys: tuple[ChunkKey, ...]

    @property
    def namespace(self) -> bytes:
        """The digest of the chunks' namespace, 16 bytes."""
        return self.keys[0].namespace if self.keys else b""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedUp(Event):
    """A tier was asked for `chunks`, of any namespaces, and has `found` of them."""

    tier: str
    chunks: int
    found: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(ChunkEvent):
    """These chunks came from a tier, in one load; `seconds`: how long the load waited for them."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Missed(ChunkEvent):
    """Chunks that were asked for, and did not come."""

    labels: ClassVar = ("reason", "tier")
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored(ChunkEvent):
    """A tier now has these chunks; `seconds`: how long encoding and storing them took."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped(ChunkEvent):
    """Chunks that a tier did not store."""

    labels: ClassVar = ("reason", "tier")
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Evicted(ChunkEvent):
    """A tier removed these chunks to make room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed(ChunkEvent):
    """A tier removed these chunks because they are of no use any more, such as damaged ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged(ChunkEvent):
    """What a tier has in place of these chunks cannot be used."""

    labels: ClassVar = ("reason", "tier")
    reason: Reason
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """A call of a tier's store failed."""

    labels: ClassVar = ("operation", "reason", "tier")
    tier: str
    operation: Operation
    reason: Reason
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bypassed(Event):
    """A tier's path is not used from now on."""

    labels: ClassVar = ("path", "tier")
    tier: str
    path: Path
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InUse(Event):
    """A tier's path is used again."""

    labels: ClassVar = ("path", "tier")
    tier: str
    path: Path
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginFailed(Event):
    """A plugin raised when it was told of an event, or did not take them as fast as they came."""

    labels: ClassVar = ("plugin",)
    plugin: str
    """Its name and distribution."""
    cause: str


def by_namespace(keys: Iterable[ChunkKey]) -> Iterator[tuple[ChunkKey, ...]]:
    """Keys that need not be of one namespace, one namespace's after the other."""
    ordered = sorted(keys, key=lambda key: key.namespace)  # stable: roots stay in front
    for _, group in groupby(ordered, lambda key: key.namespace):
        yield tuple(group)
