"""Streams: what several threads read for one load, merged. They may hang; who takes does not."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Generic, TypeVar

from lmcache_core.io.daemon_pool import DaemonPool, as_exception
from lmcache_core.io.transfer import Transfer

T = TypeVar("T")

READ_AHEAD = 2
"""Items that wait in each stream, read but not yet taken."""


class _End(Exception):
    """A stream has ended."""


class _Stream(Generic[T]):
    """A generator, run on whatever thread is free, as far ahead as may be. While nobody takes from
    it, it has no thread."""

    def __init__(self, items: Generator[T, None, None], threads: DaemonPool) -> None:
        self._items, self._threads = items, threads
        self._box: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a forgotten load may be collected while it is held
        self._ahead = 0
        self._running = True
        self._over = False
        threads.submit(self._run)

    def take(self, transfer: Transfer) -> T:
        """The next item. Raises what the generator raised, _End, or DeadlineExceeded."""
        item = self._next(transfer)
        if isinstance(item, Exception):
            raise item
        with self._lock:
            self._ahead -= 1
            start = not (self._running or self._over)
            self._running |= start
        if start:
            self._threads.submit(self._run)
        return item

    def _next(self, transfer: Transfer) -> T | Exception:
        try:
            return self._box.get_nowait()
        except queue.Empty:
            pass
        with transfer.waiting():
            while True:
                left = transfer.remaining()
                try:
                    return self._box.get(timeout=max(left, 0.001))
                except queue.Empty:
                    if left <= 0:
                        raise transfer.late() from None

    def _run(self) -> None:
        while True:
            try:
                item: T | Exception = next(self._items)
            except StopIteration:
                item = _End()
            except BaseException as error:
                item = as_exception(error)
            with self._lock:
                self._box.put(item)
                self._ahead += 1
                over = self._over = self._over or isinstance(item, Exception)
                self._running = not over and self._ahead < READ_AHEAD
                going = self._running
            del item
            if not going:
                break
        if over:
            self._items.close()

    def close(self) -> None:
        """Read no further. A thread that reads just now ends the generator after that."""
        with self._lock:
            self._over = True
            parked = not self._running
        if parked:
            self._items.close()


def merged(
    streams: Sequence[Generator[T, None, None]], threads: DaemonPool, transfer: Transfer
) -> Iterator[T]:
    """What all of them yield, in turn. Raises what one of them does, or DeadlineExceeded."""
    running: deque[_Stream[T]] = deque()
    started: list[_Stream[T]] = []
    try:
        for items in streams:
            started.append(_Stream(items, threads))
        running.extend(started)
        while running:
            stream = running.popleft()
            try:
                item = stream.take(transfer)
            except _End:
                continue
            running.append(stream)
            yield item
            del item
    finally:
        transfer.end()
        for stream in started:
            stream.close()
