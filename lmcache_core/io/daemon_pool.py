"""Daemon threads for calls that may hang: the caller waits for a while, the thread may wait on.

concurrent.futures' own pool joins its threads when the interpreter exits, so one hung store would
hang the whole process; these do not.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from lmcache_core.errors import StorageError
from lmcache_core.io.threads import start_thread
from lmcache_core.io.transfer import Transfer

T = TypeVar("T")
_Job = tuple["Future[Any]", Callable[[], Any]]


class DaemonPool:
    """At most `limit` threads, started when all others are busy."""

    def __init__(self, name: str, limit: int) -> None:
        self._name, self._limit = name, limit
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        """Threads that no job has been promised to; below 0 jobs that wait for one."""
        self._closed = False

    def __repr__(self) -> str:
        return f"<DaemonPool {self._name}: {len(self._threads)} threads, {max(0, self._idle)} idle>"

    def start(self) -> None:
        """Have a thread from now on: `submit` fails no more for want of one.

        Raises RuntimeError where not one can be had.
        """
        with self._lock:
            self._idle += self._start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` on a thread; cancelling the future before it starts prevents it.

        Raises RuntimeError once closed, and where not one thread can be had.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name}: closed")
            wanted = self._idle <= 0 and len(self._threads) < self._limit
            if not (wanted and self._start()):
                self._idle -= 1
            self._jobs.put((future, work))
        return future

    def _start(self) -> bool:
        try:
            self._threads.add(start_thread(self._run, self._name))
        except RuntimeError:
            if not self._threads:
                raise
            return False
        return True

    def call(self, work: Callable[[], T], transfer: Transfer) -> T:
        """What `work` returns or raises; DeadlineExceeded where it outlasts `transfer`."""
        future = self.submit(work)
        while True:
            left = transfer.remaining()
            try:
                return future.result(max(0.0, left))
            except FutureTimeout:
                if future.done():  # the work itself raised a TimeoutError
                    raise
            if left <= 0:
                future.cancel()
                raise transfer.late()

    def close(self, patience: float = 0.5) -> None:
        """Idle threads end now; one that hangs is left behind and ends when its call does."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        for _ in threads:
            self._jobs.put(None)
        end = time.monotonic() + patience
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            _do(*job)
            del job  # hold no buffer while idle
            with self._lock:
                self._idle += 1
        with self._lock:
            self._idle -= 1
            self._threads.discard(threading.current_thread())


def _do(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:  # handed to whoever waits
        future.set_exception(as_exception(error))


def as_exception(error: BaseException) -> Exception:
    """What a plugin raised on a thread of ours, as what cannot end who waits for it: a panic of
    Rust's or a SystemExit is a failure like others there."""
    if isinstance(error, Exception):
        return error
    return StorageError(f"{type(error).__name__}: {error}")
