"""What an engine's steps take, as the load gate hears it."""

from __future__ import annotations

import pytest

from lmcache_core.connector import LoadGate, Steps, steps


class Heard(LoadGate):
    """A load gate that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__([True], lambda tier, state, cause: None)
        self.prefills: list[tuple[int, float]] = []

    def record_prefill(self, tokens: int, seconds: float) -> None:
        self.prefills.append((tokens, seconds))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(steps.time, "monotonic", lambda: now[0])
    return now


def test_a_step_takes_from_its_beginning_to_its_end(clock: list[float]) -> None:
    gate = Heard()
    timed = Steps(gate)
    timed.begin(1, 512)
    clock[0] = 2.0
    timed.end(1)
    assert gate.prefills == [(512, 2.0)]


def test_one_that_is_scheduled_early_begins_when_the_one_before_ends(clock: list[float]) -> None:
    gate = Heard()
    timed = Steps(gate)
    timed.begin(1, 512)
    timed.begin(2, 256)
    clock[0] = 2.0
    timed.end(1)
    clock[0] = 3.0
    timed.end(2)
    assert gate.prefills == [(512, 2.0), (256, 1.0)]


def test_a_step_that_nobody_began_is_no_prefill(clock: list[float]) -> None:
    gate = Heard()
    Steps(gate).end(7)
    assert gate.prefills == [(0, 0.0)]
