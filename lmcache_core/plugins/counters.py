"""Counters: what `CacheEngine.stats` shows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from lmcache_core.plugins.events import Event
from lmcache_core.plugins.metrics import METRICS, Metric, label_values

_FOLD = 256
"""Events that wait to be counted, at most about this many."""


class Counters:
    """Counts events, by metrics.py's table.

    An event may be told at any moment, by a finalizer in the middle of any other call, this one's
    included. So it is put aside, and counted when somebody asks or many wait; by a generator, which
    runs once at a time as under a lock, but cannot be left locked by an interrupt (Ctrl-C).
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._counts: dict[tuple[str, ...], float] = {}
        self._folds = self._folding()

    def __repr__(self) -> str:
        return f"Counters({self.snapshot()})"

    def add(self, event: Event) -> None:
        """Count an event."""
        self._events.append(event)
        if len(self._events) >= _FOLD:
            self._fold()

    def snapshot(self) -> dict[tuple[str, ...], float]:
        """Counts by (name, labels ...), such as ("missed", "damaged", "disk"): those of chunks by
        what was done to them, others as metrics are called."""
        end = time.monotonic() + 1  # longer only where this thread itself was interrupted in it
        while not self._fold() and time.monotonic() < end:
            time.sleep(0.0001)
        return self._counts.copy()

    def _fold(self) -> bool:
        """Count what waits; False where that is being done."""
        try:
            next(self._folds)
        except ValueError:  # it is executing already
            return False
        return True

    def _folding(self) -> Iterator[None]:
        try:
            while True:
                while self._events:
                    event = self._events.popleft()
                    for metric in _BY_EVENT[type(event)]:
                        key = (metric.counted_as, *label_values(event))
                        self._counts[key] = self._counts.get(key, 0) + metric.amount(event)
                yield
        finally:
            self._folds = self._folding()  # this one was interrupted


_BY_EVENT: dict[type[Event], list[Metric]] = {}
for each in METRICS:
    _BY_EVENT.setdefault(each.event, []).append(each)
