"""Threads of ours run where an engine wants them, not where the thread is bound that starts them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from lmcache_core.backend import DaemonPool, Transfer, start_thread
from lmcache_core.connector import run_threads_on


@pytest.fixture
def bound() -> Iterator[set[int]]:
    """This thread is bound to one core; all that it might use are given."""
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system binds no thread to a core")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(cores)])
    yield cores
    run_threads_on(())
    os.sched_setaffinity(0, cores)


def where() -> set[int]:
    return os.sched_getaffinity(0)


def test_a_thread_of_ours_is_a_named_daemon() -> None:
    go = threading.Event()
    thread = start_thread(go.wait, "one of ours")
    assert thread.name == "one of ours"
    assert thread.daemon
    go.set()
    thread.join()


def test_threads_run_where_they_are_told_to(bound: set[int]) -> None:
    workers = DaemonPool("t", 2)
    assert workers.call(where, Transfer(5.0)) == {min(bound)}
    workers.close()
    run_threads_on(bound)
    workers = DaemonPool("t", 2)
    assert workers.call(where, Transfer(5.0)) == bound
    assert where() == {min(bound)}  # whoever starts them stays
    workers.close()


def test_cores_that_are_gone_stop_nothing(bound: set[int]) -> None:
    run_threads_on({max(bound) + 1000})
    workers = DaemonPool("t", 1)
    assert workers.call(where, Transfer(5.0)) == {min(bound)}
    workers.close()
