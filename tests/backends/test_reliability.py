"""Every call ends by its deadline, whatever a real store does: the rows of docs/reliability.md.

The page has the exact times of a quiet machine. Here a call may take what a busy one adds, but
never a second deadline.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.reliability import CALLS, PAGE, STORES, Fault, Store, tried

DEADLINE = 0.6
BUSY = 0.4
"""Seconds that other work on the machine may cost a call."""
OFTEN = (
    "is silent", "brings nothing after 2.5 MB", "answers after 0.9 deadlines", "swallows packets",
    "reads hang", "a lock is held by a process that stopped",
)  # fmt: skip
"""Faults that stand for the others in ordinary runs."""


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with STORES[request.param][0](tmp_path) as store:
        yield store


def check(store: Store, fault: Fault) -> None:
    outcome = tried(store, fault, DEADLINE, rounds=1)
    if max(outcome.waits.values()) > DEADLINE + BUSY:  # once more: others work here, too
        again = tried(store, fault, DEADLINE, rounds=1)
        outcome.waits = {call: min(wait, again.waits[call]) for call, wait in outcome.waits.items()}
    assert set(outcome.waits) == set(CALLS)
    late = {call: wait for call, wait in outcome.waits.items() if wait > DEADLINE + BUSY}
    assert not late, f"{store.name}, which {fault.name}"
    assert not outcome.wrong
    assert fault.loses or not outcome.lost


def test_no_call_waits_for_longer_than_its_deadline(store: Store) -> None:
    for fault in STORES[store.name][1]:
        if fault.name in OFTEN:
            check(store, fault)


@pytest.mark.soak
def test_no_fault_of_the_page_costs_more(store: Store) -> None:
    for fault in STORES[store.name][1]:
        check(store, fault)


def test_the_page_has_every_fault() -> None:
    page = PAGE.read_text()
    for name, (_, faults) in STORES.items():
        part = page.split(f"## {name}\n")[1].split("\n## ")[0]
        assert [fault.name for fault in faults] == [
            line.split("|")[1].strip() for line in part.splitlines()[3:] if line.startswith("|")
        ]
