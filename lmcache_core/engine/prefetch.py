"""Prefetch: chunks brought into the fastest tier before anybody asks for them."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

from lmcache_core.io.daemon_pool import DaemonPool
from lmcache_core.kv.keys import ChunkKey

GIVE_WAY_SECONDS = 1.0
"""How long a chunk that nobody waits for gives way to loads under way: one that was put aside
does not hold it up for ever."""

_LOOK_SECONDS = 0.005
"""How often it looks whether they have ended."""

Promote = Callable[[Sequence[ChunkKey]], Iterator[int]]


class Request:
    """A load that somebody waits for, until it ends or is forgotten."""

    def __init__(self) -> None:
        self.ended = False

    def end(self) -> None:
        """Nobody waits any more."""
        self.ended = True


class Requests:
    """Which loads are under way that somebody waits for. None is counted for longer than it lives,
    whatever interrupts it."""

    def __init__(self) -> None:
        self._begun: weakref.WeakSet[Request] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<Requests: {len(self._begun)} begun>"

    def begin(self) -> Request:
        """One more."""
        request = Request()
        self._begun.add(request)
        return request

    def give_way(self, timeout: float) -> None:
        """Wait until none is left, or for `timeout` seconds."""
        end = time.monotonic() + timeout
        while not all(each.ended for each in list(self._begun)) and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)


class Prefetch:
    """Chunks on their way. Thread-safe."""

    def __init__(self, keys: Sequence[ChunkKey]) -> None:
        self.keys = tuple(keys)
        self.chunks = 0
        """Length of the prefix that the fastest tier has by now."""
        self._ended, self._cancelled = threading.Event(), threading.Event()

    def __repr__(self) -> str:
        state = "ended" if self.done else "under way"
        return f"<Prefetch: {self.chunks} of {len(self.keys)} chunks, {state}>"

    @property
    def done(self) -> bool:
        """Whether no more will come."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Fetch no more than what is under way."""
        self._cancelled.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; False where that takes longer."""
        return self._ended.wait(timeout)

    def run(self, promote: Promote, requests: Requests) -> None:
        """Fetch, behind `requests`."""
        try:
            chunks = () if self._cancelled.is_set() else promote(self.keys)
            for self.chunks in chunks:
                if self._cancelled.is_set():
                    return
                requests.give_way(GIVE_WAY_SECONDS)
        finally:
            self._ended.set()


class Prefetcher:
    """One thread, which fetches one prefix after the other."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._threads = DaemonPool("lmcache-prefetch", 1)
        self._under_way: weakref.WeakSet[Prefetch] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<Prefetcher: {len(self._under_way)} asked for>"

    def add(self, keys: Sequence[ChunkKey], promote: Promote) -> Prefetch:
        """Fetch these after what was asked for before; nothing where no thread can be had."""
        prefetch = Prefetch(keys)
        self._under_way.add(prefetch)
        try:
            self._threads.submit(lambda: prefetch.run(promote, self._requests))
        except RuntimeError:  # closed, or no thread can be had
            prefetch.cancel()
            prefetch.run(promote, self._requests)
        return prefetch

    def close(self) -> None:
        """Cancel all."""
        for prefetch in list(self._under_way):
            prefetch.cancel()
        self._threads.close()
