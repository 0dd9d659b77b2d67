"""Time that is not the wall's: shared among those who wait at once, and doubled from try to try."""

from __future__ import annotations

import time


class SharedClock:
    """Virtual time in seconds: while n users run, it passes at 1/n of the wall clock's speed.

    The virtual time of fair queueing (Demers, Keshav, Shenker: Analysis and Simulation of a Fair
    Queueing Algorithm, 1989). Whoever owns it holds a lock of its own around each call.
    """

    def __init__(self) -> None:
        self.users = 0
        self._now = 0.0
        self._at = time.monotonic()

    def now(self) -> float:
        """The virtual second."""
        at = time.monotonic()
        if self.users:
            self._now += (at - self._at) / self.users
        self._at = at
        return self._now

    def enter(self) -> float:
        """One more runs, from the virtual second that is returned."""
        now = self.now()
        self.users += 1
        return now

    def leave(self) -> float:
        """One less runs, from the virtual second that is returned."""
        now = self.now()
        self.users -= 1
        return now


class Backoff:
    """Seconds to wait before the next try: `first`, then doubled each time up to `longest`."""

    def __init__(self, first: float, longest: float) -> None:
        self.first, self.longest = first, longest
        self._next = first

    def __repr__(self) -> str:
        return f"<Backoff: {self._next:.3g} s next>"

    def next(self) -> float:
        """The next wait."""
        wait = self._next
        self._next = min(2 * wait, self.longest)
        return wait

    def reset(self) -> None:
        """It worked: begin with the first wait again."""
        self._next = self.first
