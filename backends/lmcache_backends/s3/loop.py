"""Async work for callers that wait: an event loop on a thread of its own, and what ends work there
that makes no progress."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, TypeVar

from lmcache_backends._net.connection import SLOWEST
from lmcache_core.backend import StorageError, start_thread

T = TypeVar("T")

_CLOSE_SECONDS = 5.0


class Loop:
    """An event loop on a daemon thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = start_thread(self._run, name)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `work` there; cancelling the future cancels it."""
        with self._lock:  # nothing may come after the end, for nobody would answer it
            if not self._closed and self._thread.is_alive():  # it is not, in a forked child
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise StorageError("closed")

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns or raises."""
        job = self.submit(work)
        try:
            return result(job)
        finally:
            job.cancel()

    def soon(self, work: Callable[[], object]) -> None:
        """Call `work` there, unless all is over."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel everything, run `last` and end the thread; one that hangs is left behind."""
        with self._lock:
            if not self._closed and self._thread.is_alive():
                asyncio.run_coroutine_threadsafe(self._end(last), self._loop)
            self._closed = True
        self._thread.join(_CLOSE_SECONDS)

    async def _end(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(last(), return_exceptions=True)
        await self._loop.shutdown_default_executor()
        self._loop.stop()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()


def result(job: Future[T]) -> T:
    """What a job returns or raises; StorageError where it was cancelled."""
    try:
        return job.result()
    except CancelledError:
        raise StorageError("closed") from None


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return, in order; the first error, after the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


class Patience:
    """Ends what runs inside it after `timeout` seconds without progress.

    Only time in which a request is under way counts, not that in which the caller is busy. What is
    slower than its share of SLOWEST, which all that have requests under way share, is none.
    """

    def __init__(self, timeout: float, waiting: set[Patience]) -> None:
        """`waiting`: those with requests under way."""
        self.reason = ""
        """What the server said last, for the message."""
        self._waiting = waiting
        self._timeout = self._left = timeout
        self._requests = 0

    async def __aenter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._scope = asyncio.timeout(None)
        await self._scope.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._scope.__aexit__(kind, error, traceback)
        except TimeoutError:
            text = f"no answer within {self._timeout:.3g} s{self.reason}"
            raise TimeoutError(text) from None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A request is under way."""
        self._requests += 1
        if self._requests == 1:
            self._waiting.add(self)
            self._end(self._loop.time() + self._left)
        try:
            yield
        finally:
            self._requests -= 1
            if self._requests == 0:
                self._waiting.discard(self)
                self._left = (self._scope.when() or 0.0) - self._loop.time()
                self._end(None)

    def moved(self, nbytes: int) -> None:
        """So many bytes came or went."""
        latest = self._loop.time() + self._timeout
        seconds = nbytes * len(self._waiting) / SLOWEST
        self._end(min(latest, (self._scope.when() or latest) + seconds))

    def _end(self, when: float | None) -> None:
        if not self._scope.expired():
            self._scope.reschedule(when)
