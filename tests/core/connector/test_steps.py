"""What an engine's steps take, as the load gate hears it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import lmcache_core
from lmcache_core import unverified
from lmcache_core.connector import LoadGate, Steps, row_layout, steps, whole


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
    monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=lambda: now[0]))
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


def test_an_engine_of_ones_own_has_its_loads_judged(clock: list[float], tmp_path: Path) -> None:
    """It tells what its prefills took, and its loads: what does not pay is found no more."""
    tier = {"backend": "disk", "path": str(tmp_path / "kv"), "capacity": "1MiB"}
    with lmcache_core.open({"chunk_size": 16, "tiers": [tier]}) as cache:
        name = cache.namespace(model="m", weights=unverified("w"), layout=row_layout(8))
        keys = cache.keys(name, range(64))
        cache.store(name, keys, whole(lambda index, out: out["g0.k"].zero_()))
        assert cache.flush(20)
        computing = Steps(cache.load_gate)
        computing.begin(1, 512)
        clock[0] += 0.5
        computing.end(1)
        for _ in range(3):
            hit = cache.lookup(keys)
            begun = cache.load_gate.begin()
            assert len(list(cache.load(hit))) == hit.chunks == 4
            cache.load_gate.end(begun)
            cache.load_gate.record_load(0, 64, 2.0)  # 64 tokens take a 16th of a second to compute
        assert cache.lookup(keys).chunks == 0
        assert cache.bypassed(0)
