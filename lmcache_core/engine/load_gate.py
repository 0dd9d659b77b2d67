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

    def __init__(self, judged: Sequence[bool], changed: Callable[[int, str, str], None]) -> None:
        """`judged`: for each tier whether it may be bypassed. `changed` hears (tier's number,
        "open" or "closed", cause)."""
        self._books = [_Book() if each else None for each in judged]
        self._changed = changed
        self._speeds: deque[float] = deque(maxlen=PREFILLS)
        self._lock = threading.Lock()
        self._running = 0
        self._shared = self._now = 0.0

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
            self._pass(1)
            return self._shared

    def end(self, begun: float) -> float:
        """A load is over. Returns its seconds, those of loads beside it taken off."""
        with self._lock:
            self._pass(-1)
            return self._shared - begun

    def _pass(self, more: int) -> None:
        now = time.monotonic()
        if self._running:
            self._shared += (now - self._now) / self._running
        self._now = now
        self._running += more


class _Book:
    """Of one tier."""

    def __init__(self) -> None:
        self.until = 0.0
        """Until when it is bypassed."""
        self._pause = PAUSE_SECONDS[0]
        self._won = 0.0
        self._loads = 0
        self._open = False

    def add(self, won: float) -> tuple[str, str] | None:
        """Book seconds won or, below 0, lost. Returns (state, cause) where that changes it."""
        self._won = FADING * self._won + won
        self._loads += 1
        if self._loads < LOADS:
            return None
        if self._won >= 0:
            was_open, self._open, self._pause = self._open, False, PAUSE_SECONDS[0]
            return ("closed", "loading pays again") if was_open else None
        cause = f"loading takes {-self._won:.2g} s longer than computing; for {self._pause:.0f} s"
        self.until = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, PAUSE_SECONDS[1])
        self._won, self._loads, self._open = 0.0, 0, True
        return "open", cause
