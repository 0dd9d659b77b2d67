"""Counters: what `CacheEngine.stats` shows."""

from __future__ import annotations

import threading
from collections import deque

from lmcache_core.plugins.events import Event
from lmcache_core.plugins.metrics import METRICS, Metric, label_values

_FOLD = 256
"""Events that wait to be counted, at most about this many."""


class Counters:
    """Counts events, by metrics.py's table.

    An event may be told at any moment, by a finalizer in the middle of any other call, this one's
    included. So it is put aside, without a lock, and counted when somebody asks or many wait.
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._counts: dict[tuple[str, ...], float] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Counters({self.snapshot()})"

    def add(self, event: Event) -> None:
        """Count an event."""
        self._events.append(event)
        if len(self._events) >= _FOLD:
            self._fold(wait=0)

    def snapshot(self) -> dict[tuple[str, ...], float]:
        """Counts by (name, labels ...), such as ("missed", "damaged", "disk"): those of chunks by
        what was done to them, others as metrics are called."""
        self._fold(wait=1)  # longer only where this thread itself was interrupted in `_fold`
        return dict(self._counts)

    def _fold(self, wait: float) -> None:
        if not self._lock.acquire(timeout=wait):
            return
        try:
            while self._events:
                event = self._events.popleft()
                for metric in _BY_EVENT[type(event)]:
                    key = (metric.counted_as, *label_values(event))
                    self._counts[key] = self._counts.get(key, 0) + metric.amount(event)
        finally:
            self._lock.release()


_BY_EVENT: dict[type[Event], list[Metric]] = {}
for each in METRICS:
    _BY_EVENT.setdefault(each.event, []).append(each)
