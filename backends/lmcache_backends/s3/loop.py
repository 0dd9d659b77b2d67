"""Async work for callers that wait: an event loop on a thread of its own, and what ends work there
that makes no progress."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from lmcache_core.backend import StorageError, Transfer, start_thread

T = TypeVar("T")

_CLOSE_SECONDS = 5.0


class Loop:
    """An event loop on a daemon thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = start_thread(self._run, name)

    def __repr__(self) -> str:
        return f"<Loop: {'closed' if self._closed else 'running'}>"

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


@contextlib.asynccontextmanager
async def ended_by(transfer: Transfer) -> AsyncIterator[None]:
    """End what runs inside when the call has had its time. Raises DeadlineExceeded."""
    loop = asyncio.get_running_loop()
    scope = asyncio.timeout(None)
    timer: asyncio.Handle = loop.call_soon(lambda: look())

    def look() -> None:
        nonlocal timer
        left = transfer.remaining()
        if left > 0:
            timer = loop.call_later(left, look)
        else:
            scope.reschedule(loop.time())

    try:
        async with scope:
            yield
    except TimeoutError:
        raise transfer.late() from None
    finally:
        timer.cancel()
