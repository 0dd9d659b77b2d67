"""Daemon threads for calls that may hang: the caller waits for a while, the thread may wait on.

concurrent.futures' own pool joins its threads when the interpreter exits, so one hung store would
hang the whole process; these do not.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from lmcache_core.errors import StorageError
from lmcache_core.io.threads import start_thread
from lmcache_core.io.transfer import Transfer

T = TypeVar("T")


class _Job:
    """Something to do, and what comes of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._work = work

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._work())
        except BaseException as error:  # handed to whoever waits
            self.future.set_exception(as_exception(error))


class DaemonPool:
    """At most `limit` threads, started when all others are busy."""

    def __init__(self, name: str, limit: int) -> None:
        self._name, self._limit = name, limit
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._open: weakref.WeakSet[_Job] = weakref.WeakSet()
        """Jobs that wait or run. One whose `submit` was interrupted is none."""
        self._closed = False

    def __repr__(self) -> str:
        return f"<DaemonPool {self._name}: {len(self._threads)} threads, {max(0, self._idle)} idle>"

    @property
    def _idle(self) -> int:
        """Threads that no job needs; below 0 jobs that wait for one."""
        return len(self._threads) - len(self._open)

    def start(self) -> None:
        """Have a thread from now on: `submit` fails no more for want of one.

        Raises RuntimeError where not one can be had.
        """
        with self._lock:
            self._start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` on a thread; cancelling the future before it starts prevents it.

        Raises RuntimeError once closed, and where not one thread can be had.
        """
        job = _Job(work)
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name}: closed")
            if self._idle <= 0 and len(self._threads) < self._limit:
                self._start()
            self._open.add(job)
            self._jobs.put(job)
        return job.future

    def _start(self) -> None:
        try:
            self._threads.add(start_thread(self._run, self._name))
        except RuntimeError:
            if not self._threads:
                raise

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
        self._jobs.put(None)
        end = time.monotonic() + patience
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        me = threading.current_thread()
        with self._lock:
            self._threads.add(me)  # who started it may have been interrupted
        while (job := self._jobs.get()) is not None:
            job.run()
            with self._lock:
                self._open.discard(job)
            del job  # hold no buffer while idle
        self._jobs.put(None)  # for the next
        with self._lock:
            self._threads.discard(me)


def as_exception(error: BaseException) -> Exception:
    """What a plugin raised on a thread of ours, as what cannot end who waits for it: a panic of
    Rust's or a SystemExit is a failure like others there."""
    if isinstance(error, Exception):
        return error
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:  # its author's mistake, too
        text = f"{type(error).__name__} without a text"
    return StorageError(text).with_traceback(error.__traceback__)
