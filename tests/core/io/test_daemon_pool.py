"""Workers: calls that may hang do not hang their caller, nor the interpreter's exit."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref

import pytest

from lmcache_core.backend import DaemonPool
from lmcache_core.errors import DeadlineExceeded
from lmcache_core.io.transfer import Transfer
from tests.servers import PATIENCE
from tests.threads import no_more_threads


def test_results_and_exceptions_come_back() -> None:
    workers = DaemonPool("t", 2)
    assert workers.call(lambda: 42, Transfer(5.0)) == 42
    with pytest.raises(KeyError):
        workers.call(lambda: {}["missing"], Transfer(5.0))
    workers.close()


def test_a_hung_call_costs_its_deadline_and_the_next_one_goes_on() -> None:
    workers, go = DaemonPool("t", 2), threading.Event()
    with pytest.raises(DeadlineExceeded):
        workers.call(lambda: go.wait(30), Transfer(0.05))
    assert workers.call(lambda: "fine", Transfer(5.0)) == "fine"
    go.set()
    workers.close()


def test_a_timeout_that_the_work_itself_raises_is_not_ours() -> None:
    def late() -> None:
        raise TimeoutError("the socket's own")

    workers = DaemonPool("t", 1)
    with pytest.raises(TimeoutError, match="socket"):
        workers.call(late, Transfer(5.0))
    workers.close()


def test_threads_are_started_as_needed_and_no_more_than_the_limit() -> None:
    workers, go = DaemonPool("limited", 3), threading.Event()
    futures = [workers.submit(lambda: go.wait(30)) for _ in range(6)]
    time.sleep(0.1)
    assert sum(thread.name == "limited" for thread in threading.enumerate()) == 3
    go.set()
    assert all(future.result(5) for future in futures)
    for _ in range(20):
        workers.call(lambda: None, Transfer(5.0))
    assert sum(thread.name == "limited" for thread in threading.enumerate()) == 3
    workers.close()
    assert not any(thread.name == "limited" for thread in threading.enumerate())


def test_a_queued_call_that_was_given_up_never_runs() -> None:
    workers, go, ran = DaemonPool("t", 1), threading.Event(), threading.Event()
    workers.submit(lambda: go.wait(30))
    with pytest.raises(DeadlineExceeded):
        workers.call(ran.set, Transfer(0.05))
    go.set()
    workers.call(lambda: None, Transfer(5.0))
    assert not ran.is_set()
    workers.close()


def test_where_no_more_threads_can_be_had_those_there_are_do_it() -> None:
    workers, go = DaemonPool("t", 4), threading.Event()
    first = workers.submit(lambda: go.wait(30))
    with no_more_threads():
        second = workers.submit(lambda: "done")
        with pytest.raises(RuntimeError, match="thread"):
            DaemonPool("none", 4).submit(lambda: None)
    go.set()
    assert first.result(PATIENCE)
    assert second.result(PATIENCE) == "done"
    assert workers.call(lambda: "again", Transfer(PATIENCE)) == "again"
    workers.close()


def test_who_started_one_has_a_thread_whatever_comes() -> None:
    workers = DaemonPool("t", 4)
    workers.start()
    with no_more_threads():
        assert workers.call(lambda: "done", Transfer(PATIENCE)) == "done"
        with pytest.raises(RuntimeError, match="thread"):
            DaemonPool("none", 4).start()
    assert sum(thread.name == "t" for thread in threading.enumerate()) == 1
    workers.close()


def test_once_closed_they_refuse_what_would_never_run() -> None:
    workers = DaemonPool("t", 1)
    workers.call(lambda: None, Transfer(5.0))
    workers.close()
    with pytest.raises(RuntimeError, match="closed"):
        workers.submit(lambda: None)


def test_an_idle_thread_holds_nothing() -> None:
    class Big:
        pass

    workers, big = DaemonPool("t", 1), Big()
    gone = weakref.ref(big)
    workers.call(lambda kept=big: None, Transfer(5.0))  # type: ignore[misc]
    del big
    time.sleep(0.05)
    assert gone() is None
    workers.close()


def test_a_hung_call_does_not_hold_the_interpreter() -> None:
    program = (
        "import time; from lmcache_core.backend import DaemonPool\n"
        "DaemonPool('t', 1).submit(lambda: time.sleep(60))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def test_no_job_waits_for_a_busy_thread_while_there_may_be_another() -> None:
    for _ in range(10):
        workers, stop = DaemonPool("test", 32), threading.Event()
        for _ in range(8):
            workers.call(lambda: None, Transfer(PATIENCE))
            for _ in range(2):
                workers.submit(lambda stop=stop: stop.wait(2 * PATIENCE))
        workers.call(lambda: None, Transfer(PATIENCE))
        stop.set()
        workers.close()
