"""Breaker: bypasses a failing store and finds out by itself when it works again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import StrEnum

from lmcache_core.io.clock import Backoff
from lmcache_core.io.threads import start_thread

FAILURES = 3
"""Errors in a row after which the store is bypassed; one missed deadline is enough."""
PROBE_SECONDS = (0.1, 5.0)
"""Wait between probes: from the first, doubled up to the second."""
RELAPSE_SECONDS = 30.0
"""The longest wait before the first probe of a store that fails again and again although probes
succeed."""


class State(StrEnum):
    """Of a path to a store."""

    IN_USE = "in use"
    BYPASSED = "bypassed"


class Breaker:
    """While a store is bypassed, a thread probes it until it answers. One that fails again before
    it has proved itself is left alone for twice as long as the time before."""

    def __init__(
        self, name: str, probe: Callable[[], None], changed: Callable[[State, str], None]
    ) -> None:
        """`probe` raises while the store fails; `changed` hears (state, cause)."""
        self._name, self._probe, self._changed = name, probe, changed
        self._lock = threading.Lock()
        self._failures = 0
        self._relapses = Backoff(PROBE_SECONDS[0], RELAPSE_SECONDS)
        self._stop = threading.Event()
        self.bypassed = False

    def __repr__(self) -> str:
        state = State.BYPASSED if self.bypassed else State.IN_USE
        return f"<Breaker {self._name}: {state}, {self._failures} failures in a row>"

    def succeeded(self, *, proof: bool = True) -> None:
        """A call worked; `proof` where it did what the store is for, and not just answered."""
        if self._failures:
            self._failures = 0
        if proof:
            self._relapses.reset()

    def failed(self, cause: str, *, at_once: bool) -> None:
        """A call failed; `at_once` where waiting for it cost a deadline."""
        with self._lock:
            self._failures += 1
            if self.bypassed or self._stop.is_set():
                return
            if not at_once and self._failures < FAILURES:
                return
            self.bypassed = True
            first = self._relapses.next()
        self._changed(State.BYPASSED, cause)
        waits = Backoff(first, max(first, PROBE_SECONDS[1]))
        try:
            start_thread(lambda: self._heal(waits), f"{self._name}-probe")
        except RuntimeError as error:  # nothing else would ever use it again
            self._use(f"cannot be probed: {error}")

    def close(self) -> None:
        """Bypassed for good: no probes, no news."""
        with self._lock:
            self._stop.set()
            self.bypassed = True

    def _heal(self, waits: Backoff) -> None:
        while not self._stop.wait(waits.next()):
            try:
                self._probe()
            except BaseException:  # any failure means: not yet
                continue
            self._use("answers again")
            return

    def _use(self, cause: str) -> None:
        with self._lock:
            if self._stop.is_set():
                return
            self._failures = 0
            self.bypassed = False
        self._changed(State.IN_USE, cause)
