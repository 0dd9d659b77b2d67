"""Breaker: opens on failures, probes, closes by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from lmcache_core.io.breaker import FAILURES, Breaker, State
from tests.threads import no_more_threads


class Store:
    """Something to probe, and what the breaker said of it."""

    def __init__(self) -> None:
        self.works = False
        self.probes = 0
        self.news: list[tuple[State, str]] = []

    def ping(self) -> None:
        self.probes += 1
        if not self.works:
            raise OSError("down")

    def changed(self, state: State, cause: str) -> None:
        self.news.append((state, cause))


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def breaker(store: Store) -> Breaker:
    return Breaker("t", store.ping, store.changed)


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_some_failures_in_a_row_open_it(breaker: Breaker, store: Store) -> None:
    for _ in range(FAILURES - 1):
        breaker.failed("x", at_once=False)
    breaker.succeeded()
    for _ in range(FAILURES - 1):
        breaker.failed("x", at_once=False)
    assert not breaker.bypassed
    breaker.failed("the last", at_once=False)
    assert breaker.bypassed
    assert store.news == [(State.BYPASSED, "the last")]
    breaker.close()


def test_one_missed_deadline_opens_it(breaker: Breaker) -> None:
    breaker.failed("late", at_once=True)
    assert breaker.bypassed
    breaker.close()


def test_it_closes_by_itself_when_the_store_answers(breaker: Breaker, store: Store) -> None:
    breaker.failed("late", at_once=True)
    assert eventually(lambda: store.probes >= 2)
    assert breaker.bypassed
    store.works = True
    assert eventually(lambda: not breaker.bypassed)
    assert eventually(lambda: [state for state, _ in store.news] == [State.BYPASSED, State.IN_USE])


def test_many_failures_at_once_start_one_probe(breaker: Breaker, store: Store) -> None:
    threads = [
        threading.Thread(target=breaker.failed, args=("late",), kwargs={"at_once": True})
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(thread.name == "t-probe" for thread in threading.enumerate()) == 1
    assert len(store.news) == 1
    breaker.close()


def test_it_does_not_stay_open_where_no_thread_can_be_had_to_probe(
    breaker: Breaker, store: Store
) -> None:
    with no_more_threads():
        breaker.failed("late", at_once=True)
    assert not breaker.bypassed
    assert [state for state, _ in store.news] == [State.BYPASSED, State.IN_USE]
    breaker.failed("late", at_once=True)
    assert breaker.bypassed
    breaker.close()


def test_once_closed_down_it_stays_open_and_probes_no_more(breaker: Breaker, store: Store) -> None:
    breaker.failed("late", at_once=True)
    breaker.close()
    store.works = True
    assert eventually(lambda: not any(t.name == "t-probe" for t in threading.enumerate()))
    assert breaker.bypassed
    assert [state for state, _ in store.news] == [State.BYPASSED]
