"""What an engine's steps take: the prefills that the load gate compares loads with."""

from __future__ import annotations

import time

from lmcache_core.engine.load_gate import LoadGate


class Steps:
    """Clock of an engine that computes step by step, each perhaps scheduled before the last ended.

    Not thread-safe: for the thread that schedules.
    """

    def __init__(self, gate: LoadGate) -> None:
        self._gate = gate
        self._begun: dict[int, tuple[int, float]] = {}
        """Prefilled tokens and beginnings of steps, by number, until they end."""
        self._ended = 0.0
        """When a step ended last."""

    def __repr__(self) -> str:
        return f"Steps({len(self._begun)} under way)"

    def begin(self, number: int, tokens: int) -> None:
        """Step `number` begins; `tokens` of it are a prefill, 0 where it is none."""
        self._begun[number] = tokens, time.monotonic()

    def end(self, number: int) -> None:
        """Step `number` ended, and with it all that began before it."""
        now = time.monotonic()
        tokens, began = self._begun.pop(number, (0, now))
        self._begun = {n: step for n, step in self._begun.items() if n > number}
        self._gate.record_prefill(tokens, now - max(began, self._ended))
        self._ended = now
