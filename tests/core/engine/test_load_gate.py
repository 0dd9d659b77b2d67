"""Pays: a tier that is slower than computing is bypassed, used again, and judged anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import lmcache_core
from lmcache_core import Namespace, Tensors
from lmcache_core.engine import load_gate as pays
from lmcache_core.engine.load_gate import LOADS, PAUSE_SECONDS, PREFILL, LoadGate
from lmcache_core.io import clock as clocks
from lmcache_core.io.breaker import State

SPEED = 1000.0
"""Tokens that are computed in a second."""


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (pays, clocks):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def books(clock: Clock) -> LoadGate:
    books = LoadGate([False, True, True], lambda *_: None)
    books.record_prefill(1000, 1000 / SPEED)
    return books


def load(books: LoadGate, *seconds: float, tier: int = 1, tokens: int = 100) -> None:
    for each in seconds:
        books.record_load(tier, tokens, each)


def test_without_a_prefill_to_compare_with_every_load_is_welcome(clock: Clock) -> None:
    books = LoadGate([True], lambda *_: None)
    books.record_prefill(PREFILL - 1, 1e-6)  # too short to tell
    load(books, *[1000.0] * 10, tier=0)
    assert books.allows(0)


def test_faster_loads_are_never_stopped(books: LoadGate) -> None:
    load(books, *[0.09] * 100)
    assert books.allows(1)


def test_some_slower_ones_are_enough_and_only_for_that_tier(books: LoadGate) -> None:
    load(books, *[0.2] * (LOADS - 1))
    assert books.allows(1)
    load(books, 0.2)
    assert not books.allows(1)
    assert books.allows(2)


def test_memory_is_not_judged(books: LoadGate) -> None:
    load(books, *[1000.0] * 10, tier=0)
    assert books.allows(0)


def test_what_failed_lost_all_its_time(books: LoadGate) -> None:
    load(books, *[0.01] * LOADS, tokens=0)
    assert not books.allows(1)


def test_seconds_count_not_loads(books: LoadGate) -> None:
    """Many a little slower than computing, and from time to time one that saves much."""
    for _ in range(20):
        load(books, 1.0, tokens=10_000)
        load(books, *[0.011] * 8, tokens=10)
        assert books.allows(1)


def test_one_outlier_among_the_prefills_changes_nothing(books: LoadGate) -> None:
    books.record_prefill(1000, 1.1)
    books.record_prefill(1000, 1e-6)
    load(books, *[0.09] * 10)
    assert books.allows(1)


def test_a_tier_comes_back_each_time_after_a_longer_while(clock: Clock) -> None:
    heard: list[tuple[int, str]] = []
    books = LoadGate([True], lambda tier, state, cause: heard.append((tier, state)))
    books.record_prefill(1000, 1000 / SPEED)
    pause, longest = PAUSE_SECONDS
    while pause < longest:
        load(books, *[0.2] * LOADS, tier=0)
        load(books, *[0.2] * LOADS, tier=0)  # had begun before: not held against it
        clock.now += pause - 0.1
        assert not books.allows(0)
        clock.now += 0.1
        assert books.allows(0)
        pause = min(2 * pause, longest)
    load(books, *[0.01] * LOADS, tier=0)
    assert heard == [(0, State.BYPASSED)] * (len(heard) - 1) + [(0, State.IN_USE)]
    load(books, *[0.5] * LOADS, tier=0)
    assert not books.allows(0)
    clock.now += PAUSE_SECONDS[0]
    assert books.allows(0)


def test_loads_at_once_take_the_time_that_each_would_alone(clock: Clock, books: LoadGate) -> None:
    first = books.begin()
    clock.now += 1.0
    second = books.begin()
    clock.now += 2.0  # half of it is the first one's
    assert books.end(first) == 2.0
    clock.now += 4.0
    assert books.end(second) == 5.0
    clock.now += 100.0
    third = books.begin()
    clock.now += 1.0
    assert books.end(third) == 1.0


@pytest.mark.parametrize("rule", ["when_faster", "always"])
def test_the_engine_does_not_look_where_loading_does_not_pay(
    tmp_path: Path,
    namespace: Namespace,
    gather: Callable[[int, Tensors], None],
    caplog: pytest.LogCaptureFixture,
    rule: str,
) -> None:
    tier = {"backend": "disk", "path": str(tmp_path), "capacity": "1MiB", "name": "far"}
    with lmcache_core.open({"chunk_size": 4, "load": rule, "tiers": [tier]}) as cache:
        keys = cache.keys(namespace, range(12))
        cache.store(namespace, keys, gather)
        assert cache.flush(20)
        cache.load_gate.record_prefill(1000, 0.1)
        assert cache.lookup(keys).chunks == 3
        for _ in range(LOADS):
            cache.load_gate.record_load(0, 12, 3.0)
        hit, stats = cache.lookup(keys), cache.stats()
        assert cache.bypassed(0) == (rule != "always")
    if rule == "always":
        assert hit.chunks == 3
        assert ("missed", "slow", "far") not in stats
    else:
        assert hit.chunks == 0
        assert stats["missed", "slow", "far"] == 3
        assert stats["bypassed", "loads", "far"] == 1
        assert "tier far: loads are bypassed: loading takes" in caplog.text
