"""Patience: tells a store that is slow, or busy with other loads, from one that hangs.

All loads of a tier share what its store can send. So what comes for any of them shows that the
store works, and while n of them wait, a second counts for each as the nth part of one: the virtual
time of fair queueing (Demers, Keshav, Shenker: Analysis and Simulation of a Fair Queueing
Algorithm, 1989).
"""

from __future__ import annotations

import queue
import threading
import time
from typing import TypeVar

from lmcache_core.errors import DeadlineExceeded

T = TypeVar("T")

SLOWEST = 16 << 20
"""Bytes a second. A transfer's deadline grows by its size at this rate; slower is failing."""


class Flow:
    """What comes from a store, and how many loads wait for it."""

    def __init__(self, deadline: float) -> None:
        """`deadline`: seconds."""
        self.deadline = deadline
        self.lock = threading.Lock()
        """Held by whoever changes or reads what is below, or a load's own part of it."""
        self.waiting = 0
        self.moved_at = 0.0
        self._shared = self._shared_at = 0.0

    def moved(self) -> None:
        """The store sent something, for whichever load. Needs no lock."""
        self.moved_at = time.monotonic()

    def shared(self) -> float:
        """Seconds, each divided by the loads that waited in it."""
        now = time.monotonic()
        self._shared += (now - self._shared_at) / max(1, self.waiting)
        self._shared_at = now
        return self._shared


class Patience:
    """How long one load waits for its chunks. Thread-safe.

    It ends when nothing came from the store for a deadline. It also ends when the load's share of
    the time is a deadline more than its frames take at SLOWEST: a stream that hangs among others
    that flow is found out, too. Time in which the load's caller is busy does not count.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._promised = 0
        """Bytes of frames that began to come and are not there yet."""
        self._waited = 0.0
        """Shared seconds, less what the chunks that came may have taken."""
        self._since: float | None = None
        """The shared second up to which the wait that is under way, if any, is counted."""

    def promise(self, nbytes: int) -> None:
        """A frame of so many bytes begins to come."""
        with self._flow.lock:
            self._promised += nbytes

    def came(self, nbytes: int) -> None:
        """A frame of so many bytes is there."""
        self._flow.moved()
        with self._flow.lock:
            self._promised = max(0, self._promised - nbytes)
            self._earn(nbytes)

    def decoded(self, more: int) -> None:
        """The frame became a chunk of so many bytes more: that took time, too."""
        with self._flow.lock:
            self._earn(max(0, more))

    def take(self, box: queue.Queue[T]) -> T:
        """The next of a stream's chunks. Raises DeadlineExceeded."""
        began = time.monotonic()
        with self._flow.lock:
            self._since = self._flow.shared()
            self._flow.waiting += 1
        try:
            left = self._left(began)
            while True:
                try:
                    return box.get(timeout=max(left, 0.001))
                except queue.Empty:
                    left = self._left(began)
                if left <= 0:
                    deadline = self._flow.deadline
                    raise DeadlineExceeded(f"chunks did not come within {deadline:.3g} s")
        finally:
            with self._flow.lock:
                self._count()
                self._since = None
                self._flow.waiting -= 1

    def _left(self, began: float) -> float:
        """Seconds that a wait that began then may still last, if nothing comes."""
        deadline = self._flow.deadline
        with self._flow.lock:
            self._count()
            silence = time.monotonic() - max(began, self._flow.moved_at)
            behind = self._waited - self._promised / SLOWEST
            return min(deadline - silence, (deadline - behind) * self._flow.waiting)

    def _earn(self, nbytes: int) -> None:
        self._count()
        self._waited = max(0.0, self._waited - nbytes / SLOWEST)

    def _count(self) -> None:
        shared = self._flow.shared()
        if self._since is not None:
            self._waited += shared - self._since
            self._since = shared
