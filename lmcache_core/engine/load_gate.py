"""Whether loading pays: what loads took, beside what computing the same tokens would have.

A bet is judged when it is over. Each load is booked on the slowest tier that it needed, as seconds
won or lost; a tier whose last loads lost more than others of them won is bypassed for a while, then
used again, and judged anew.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from lmcache_core.io.breaker import State
from lmcache_core.io.clock import Backoff, SharedClock

PREFILL = 128
"""Tokens from which on the time of a prefill is that of its tokens."""
PREFILLS = 15
"""What the speed of computing is the median of."""
LOADS = 3
"""Loads before there is a verdict."""
FADING = 0.7
"""What a load still counts after the next one."""
PAUSE_SECONDS = (10.0, 300.0)
"""How long a tier is bypassed: the first, doubled from time to time up to the second."""


class LoadGate:
    """The books of one engine. Nothing is judged before the engine tells what computing takes."""

    def __init__(self, judged: Sequence[bool], changed: Callable[[int, State, str], None]) -> None:
        """`judged`: for each tier whether it may be bypassed. `changed` hears (tier's number,
        state, cause)."""
        self._books = [_Book() if each else None for each in judged]
        self._changed = changed
        self._speeds: deque[float] = deque(maxlen=PREFILLS)
        self._lock = threading.Lock()
        self._clock = SharedClock()

    def __repr__(self) -> str:
        shut = [number for number in range(len(self._books)) if not self.allows(number)]
        return f"<LoadGate: does not pay from tiers {shut}, {len(self._speeds)} prefills seen>"

    def allows(self, tier: int) -> bool:
        """Whether to load from a tier."""
        book = self._books[tier]
        return book is None or time.monotonic() >= book.until

    def record_prefill(self, tokens: int, seconds: float) -> None:
        """A prefill took so long; its queue aside."""
        if tokens >= PREFILL and seconds > 0:
            with self._lock:
                self._speeds.append(tokens / seconds)

    def record_load(self, tier: int, tokens: int, seconds: float) -> None:
        """A load, of which `tier` was the slowest, took so long; `tokens` is what came."""
        book, news = self._books[tier], None
        with self._lock:
            if book and self._speeds and self.allows(tier):
                news = book.add(tokens / statistics.median(self._speeds) - seconds)
        if news:
            self._changed(tier, *news)

    # Loads that run at once share what there is: each takes the time that it would alone.

    def begin(self) -> float:
        """A load begins; what it returns is for `end`."""
        with self._lock:
            return self._clock.enter()

    def end(self, begun: float) -> float:
        """A load is over. Returns its seconds, those of loads beside it taken off."""
        with self._lock:
            return self._clock.leave() - begun


class _Book:
    """What loads from one tier won and lost."""

    def __init__(self) -> None:
        self.until = 0.0
        """Until when it is bypassed."""
        self._pauses = Backoff(*PAUSE_SECONDS)
        self._won = 0.0
        self._loads = 0
        self._bypassed = False

    def add(self, won: float) -> tuple[State, str] | None:
        """Book seconds won or, below 0, lost. Returns (state, cause) where that changes it."""
        self._won = FADING * self._won + won
        self._loads += 1
        if self._loads < LOADS:
            return None
        if self._won >= 0:
            was, self._bypassed = self._bypassed, False
            self._pauses.reset()
            return (State.IN_USE, "loading pays again") if was else None
        pause = self._pauses.next()
        cause = f"loading takes {-self._won:.2g} s longer than computing; for {pause:.0f} s"
        self.until = time.monotonic() + pause
        self._won, self._loads, self._bypassed = 0.0, 0, True
        return State.BYPASSED, cause
