"""What the author of a backend uses: StorageBackend, and the helpers that go with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from lmcache_core.errors import ConfigError, DeadlineExceeded, Refused, StorageError
from lmcache_core.io.breaker import Breaker, State
from lmcache_core.io.buffers import Buffers, concat, nbytes_of, split_at
from lmcache_core.io.clock import Backoff
from lmcache_core.io.daemon_pool import DaemonPool
from lmcache_core.io.device import host_register
from lmcache_core.io.medium import file_system_bytes, memory_bytes
from lmcache_core.io.owners import Owners
from lmcache_core.io.process import tell_children
from lmcache_core.io.threads import start_thread
from lmcache_core.io.transfer import Transfer
from lmcache_core.kv.keys import ChunkKey
from lmcache_core.plugins.log import LOG
from lmcache_core.plugins.options import Options
from lmcache_core.plugins.registry import component
from lmcache_core.plugins.secrets import masked
from lmcache_core.plugins.units import Duration, LocalPath, Size, unquoted
from lmcache_core.policy.eviction import EvictionPolicy, Hint
from lmcache_core.policy.index import Index
from lmcache_core.policy.lru import LRU
from lmcache_core.policy.named import Tenants, eviction_policy

__all__ = [
    "LOG",
    "LRU",
    "Backoff",
    "Breaker",
    "Buffers",
    "ChunkKey",
    "ConfigError",
    "DaemonPool",
    "DeadlineExceeded",
    "Duration",
    "EvictionPolicy",
    "Hint",
    "Index",
    "LocalPath",
    "Options",
    "Owners",
    "Refused",
    "Size",
    "State",
    "StorageBackend",
    "StorageError",
    "Stored",
    "SupportsHint",
    "SupportsReserve",
    "SupportsScan",
    "Tenants",
    "Transfer",
    "component",
    "concat",
    "eviction_policy",
    "file_system_bytes",
    "host_register",
    "masked",
    "memory_bytes",
    "nbytes_of",
    "split_at",
    "start_thread",
    "tell_children",
    "unheld",
    "unquoted",
]

T = TypeVar("T")


class Stored(NamedTuple):
    """What `scan` tells of one frame."""

    key: ChunkKey
    nbytes: int


class StorageBackend(ABC):
    """Frames by key. Knows nothing of tokens, tensors or serdes.

    Plain blocking code, called from several threads at once. Every method takes many keys, in
    the order of their sequence (root first) where they belong to one, and the call's `transfer`:
    wait for the store for at most `transfer.timeout` seconds of silence, then raise.

    Any exception means "the store failed": the tier counts it, logs it once in a while and
    bypasses the store when it repeats. An absent key is not a failure.
    """

    Options: ClassVar[type[Options]] = Options
    """Pydantic model of the YAML keys that this backend takes."""

    schemes: ClassVar[Sequence[str]] = ()
    """Of URLs that `url`, one of its keys, may begin with, such as ("redis", "rediss"): by them
    LMCACHE_REMOTE_URL finds the backend."""

    medium: ClassVar[Literal["memory", "disk", "server", "object store"]] = "server"
    """What the bytes lie in, the fastest first."""

    locality: ClassVar[Literal["process", "host", "network"]] = "network"
    """Who else may have what this process stores: nobody, this host's, or any."""

    in_memory: ClassVar[bool] = False
    """True where a call never waits and nobody else can change the bytes (this host's memory):
    it is then called on the engine's own thread, and frames are not checksummed again."""

    streams: ClassVar[int] = 2
    """Calls of `get` that a load divides its keys among. While one waits for bytes the other's
    are verified and decoded."""

    def __init__(self, options: Any) -> None:  # noqa: B027
        """Open the store, on a thread that may wait. Raises ConfigError, with the reason, when it
        cannot be used at all; whether it works now is asked by `ping`."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    @abstractmethod
    def contains(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        """For each key, whether a whole frame is there. One round trip."""

    @abstractmethod
    def get(self, keys: Sequence[ChunkKey], transfer: Transfer) -> Iterator[tuple[int, Buffers]]:
        """Yield (index into keys, frame) as frames arrive, in any order; absent ones are left out.

        Read into a buffer from `transfer.allocate`, or yield memory of your own that stays valid
        and unchanged for as long as somebody refers to it. Several calls may share `transfer`.

        No frame may outlive its yield: a generator that still names it keeps its buffer from being
        used again. `yield from unheld(frames)` sees to that where frames lie in a list; else
        delete the name after the yield.
        """

    @abstractmethod
    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> int:
        """Store frames in order; return how many of them, from the first, are now there.

        Fewer than all means full: the rest is dropped, so that no hole appears. A frame that is
        there already counts as stored and is not written again. `prefix` is the sequence that they
        are part of, root first, as far as it is to be stored, of which more may follow: making room
        must not evict it, evicts nothing for a sequence that is larger than the store, and adds
        what it evicts to `transfer.evicted`. The tier touches the sequence when it is stored whole.
        A frame becomes visible whole or not at all, whatever dies when. The buffers never change
        afterwards, so memory may keep them instead of copying.
        """

    @abstractmethod
    def delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        """Remove frames; absent keys are fine."""

    def used(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        """A load took the sequence `keys` (root first): evict it late, its leaves before its root.
        Where nothing is made of the difference, as `touch`."""
        self.touch(keys, transfer)

    def touch(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:  # noqa: B027
        """A store passed along the sequence `keys` (root first), of which some may not be there:
        evict it late, its leaves before its root."""

    def ping(self, transfer: Transfer) -> None:
        """Raise unless the store works: do what reads do. Called when the tier is opened, and
        while it is bypassed. Refused says that the configuration is wrong."""
        self.contains([ChunkKey(bytes(32))], transfer)

    def close(self) -> None:  # noqa: B027
        """Release connections, files and threads. The stored frames stay."""


@runtime_checkable
class SupportsScan(Protocol):
    """A backend that can tell what it has."""

    def scan(self, transfer: Transfer) -> Iterator[Stored]:
        """Every whole frame that is there, in any order."""


@runtime_checkable
class SupportsHint(Protocol):
    """A backend whose eviction can use what a caller knows of a sequence."""

    def hint(self, keys: Sequence[ChunkKey], hint: Hint, transfer: Transfer) -> None:
        """How the sequence goes on. May be wrong: it may cost these chunks, and no others."""


@runtime_checkable
class SupportsReserve(Protocol):
    """A backend with memory of its own to gather chunks into; asked where it is `in_memory`."""

    def reserve(
        self, nbytes: int, prefix: Sequence[ChunkKey], transfer: Transfer
    ) -> memoryview | None:
        """Memory for a payload of `nbytes`, or None where there is no room.

        What fills it hands it to `put` as a frame's last part, which then need not copy it. Dropped
        instead, it goes back. `prefix` is the sequence that the frame ends, as in `put`.
        """


def unheld(items: list[T]) -> Iterator[T]:
    """Each of `items`, which is emptied meanwhile: nothing holds what was yielded."""
    items.reverse()
    while items:
        yield items.pop()
