"""What the author of a backend uses: StorageBackend, and the helpers that go with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from lmcache_core.errors import ConfigError, DeadlineExceeded, StorageError
from lmcache_core.io.buffers import Buffers, concat, split_at
from lmcache_core.io.daemon_pool import DaemonPool
from lmcache_core.io.device import host_register
from lmcache_core.io.medium import file_system_bytes, memory_bytes
from lmcache_core.io.threads import start_thread
from lmcache_core.kv.keys import ChunkKey
from lmcache_core.plugins.log import LOG
from lmcache_core.plugins.options import Options
from lmcache_core.plugins.registry import component
from lmcache_core.plugins.secrets import masked
from lmcache_core.plugins.units import Duration, LocalPath, Size, unquoted
from lmcache_core.policy.eviction import LRU, EvictionPolicy

__all__ = [
    "LOG",
    "LRU",
    "Allocate",
    "Buffers",
    "ChunkKey",
    "ConfigError",
    "DaemonPool",
    "DeadlineExceeded",
    "Duration",
    "EvictionPolicy",
    "LocalPath",
    "Options",
    "Size",
    "StorageBackend",
    "StorageError",
    "Stored",
    "component",
    "concat",
    "file_system_bytes",
    "host_register",
    "masked",
    "memory_bytes",
    "split_at",
    "start_thread",
    "unquoted",
]

Allocate = Callable[[int], memoryview]
"""nbytes -> a writable buffer of exactly that size to read a frame into."""


class Stored(NamedTuple):
    """What `scan` tells of one frame."""

    key: ChunkKey
    nbytes: int


class StorageBackend(ABC):
    """Frames by key. Knows nothing of tokens, tensors or serdes.

    Plain blocking code, called from several threads at once. Every method takes many keys, in
    the order of their sequence (root first) where they belong to one. `timeout` is in seconds:
    how long a call may go without progress before it must raise.

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

    on_evict: Callable[[Sequence[ChunkKey]], None] = staticmethod(lambda keys: None)
    """Set by the tier; call it with the keys that were evicted to make room."""

    on_progress: Callable[[], None] = staticmethod(lambda: None)
    """Set by the tier; call it now and then, from any thread, while `get` reads a large frame: a
    tier to which nothing comes for a deadline gives the store up. Frames count by themselves."""

    def __init__(self, options: Any) -> None:  # noqa: B027
        """Open the store. Raises ConfigError, with the reason, when it cannot be used at all."""

    @abstractmethod
    def contains(self, keys: Sequence[ChunkKey], timeout: float) -> list[bool]:
        """For each key, whether a whole frame is there. One round trip."""

    @abstractmethod
    def get(
        self, keys: Sequence[ChunkKey], allocate: Allocate, timeout: float
    ) -> Iterator[tuple[int, Buffers]]:
        """Yield (index into keys, frame) as frames arrive, in any order; absent ones are left out.

        Read into a buffer from `allocate` (which any thread may call), or yield memory of your
        own that stays valid and unchanged for as long as somebody refers to it.
        """

    @abstractmethod
    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        chain: Sequence[ChunkKey],
        timeout: float,
    ) -> int:
        """Store frames in order; return how many of them, from the first, are now there.

        Fewer than all means full: the rest is dropped, so that no hole appears. A frame that is
        there already counts as stored and is not written again. `chain` is the whole sequence up
        to the last frame, root first: it counts as used now, and making room must not evict it.
        A frame becomes visible whole or not at all, whatever dies when. The buffers never change
        afterwards, so memory may keep them instead of copying.
        """

    @abstractmethod
    def delete(self, keys: Sequence[ChunkKey], timeout: float) -> None:
        """Remove frames; absent keys are fine."""

    @abstractmethod
    def scan(self) -> Iterator[Stored]:
        """Every whole frame that is there, in any order."""

    def room(self, nbytes: int, chain: Sequence[ChunkKey], timeout: float) -> memoryview | None:
        """Memory of the store's own for a payload of `nbytes`, or None where it has none.

        What fills it hands it to `put` as a frame's last part, which then need not copy it. Dropped
        instead, it goes back. Asked on the engine's thread, so only where `in_memory`; `chain` is
        the sequence that the frame ends, as in `put`.
        """
        return None

    def touch(self, keys: Sequence[ChunkKey], timeout: float) -> None:  # noqa: B027
        """The sequence `keys` (root first) was used: evict it late, its leaves before its root."""

    def ping(self, timeout: float) -> None:
        """Raise unless the store works. Called while the tier is bypassed."""
        self.contains([ChunkKey(bytes(32))], timeout)

    def close(self) -> None:  # noqa: B027
        """Release connections, files and threads. The stored frames stay."""
