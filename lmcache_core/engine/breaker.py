"""Breaker: bypasses a failing store and finds out by itself when it works again."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lmcache_core.io.threads import start_thread

FAILURES = 3
"""Errors in a row that open the breaker; one missed deadline is enough."""
PROBE_SECONDS = (0.1, 5.0)
"""Wait between probes: from the first, doubled up to the second."""


class Breaker:
    """Closed: the store is used. Open: it is bypassed and a thread probes it until it answers."""

    def __init__(
        self, name: str, probe: Callable[[], None], changed: Callable[[str, str], None]
    ) -> None:
        """`probe` raises while the store fails; `changed` hears (state, cause)."""
        self._name, self._probe, self._changed = name, probe, changed
        self._lock = threading.Lock()
        self._failures = 0
        self._stop = threading.Event()
        self.is_open = False

    def succeeded(self) -> None:
        """A call worked."""
        if self._failures:
            self._failures = 0

    def failed(self, cause: str, *, at_once: bool) -> None:
        """A call failed; `at_once` where waiting for it cost a deadline."""
        with self._lock:
            self._failures += 1
            if self.is_open or self._stop.is_set():
                return
            if not at_once and self._failures < FAILURES:
                return
            self.is_open = True
        self._changed("open", cause)
        try:
            start_thread(self._heal, f"{self._name}-probe")
        except RuntimeError as error:  # nothing else would close it again
            self._shut(f"cannot be probed: {error}")

    def close(self) -> None:
        """Open for good: no probes, no news."""
        with self._lock:
            self._stop.set()
            self.is_open = True

    def _heal(self) -> None:
        wait, longest = PROBE_SECONDS
        while not self._stop.wait(wait):
            wait = min(2 * wait, longest)
            try:
                self._probe()
            except Exception:  # any failure means: not yet
                continue
            self._shut("answers again")
            return

    def _shut(self, cause: str) -> None:
        with self._lock:
            if self._stop.is_set():
                return
            self._failures = 0
            self.is_open = False
        self._changed("closed", cause)
