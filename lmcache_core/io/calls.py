"""Calls: which threads are in the middle of something that must not be cut off."""

from __future__ import annotations

import sys
import threading
import time


class Calls:
    """Threads within torch, where the interpreter's end aborts when it finds one. A context
    manager, without a lock: an interrupt may come between any two lines."""

    def __init__(self) -> None:
        self._now: dict[int, object] = {}
        """By thread, another object for each call."""

    def __repr__(self) -> str:
        return f"<Calls: {len(self._now)} threads>"

    def __enter__(self) -> None:
        self._now[threading.get_ident()] = object()

    def __exit__(self, *_: object) -> None:
        self._now.pop(threading.get_ident(), None)

    def wait(self, seconds: float) -> None:
        """Wait until those that are under way are through."""
        left, end = self._now.copy(), time.monotonic() + seconds
        while left and time.monotonic() < end:
            time.sleep(0.001)
            alive = sys._current_frames()
            left = {n: call for n, call in left.items() if self._now.get(n) is call and n in alive}
