"""Slow is told from hung, however many calls share a store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from lmcache_core.errors import DeadlineExceeded, StorageError
from lmcache_core.io.transfer import SLOWEST, Line, Transfer

TIMEOUT = 0.3
TICK = TIMEOUT / 10
FAST = int(2 * SLOWEST * TICK)
"""Bytes a tick at twice the rate that is asked for."""


@pytest.fixture
def line() -> Line:
    return Line()


@contextmanager
def each_tick(work: Callable[[], object]) -> Iterator[None]:
    """Do something over and over, beside what waits."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(TICK):
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def waited(transfer: Transfer) -> float:
    """Seconds until a call that nobody answers has had its time."""
    began = time.monotonic()
    while (left := transfer.remaining()) > 0:
        time.sleep(left)
    return time.monotonic() - began


def tells(transfer: Transfer) -> Transfer:
    transfer.moved(0)
    return transfer


def test_silence_costs_the_timeout() -> None:
    assert 0.95 * TIMEOUT <= waited(Transfer(TIMEOUT)) < 1.5 * TIMEOUT


def test_silence_counts_from_what_moved_last() -> None:
    transfer = Transfer(TIMEOUT)
    for _ in range(3):
        time.sleep(TIMEOUT / 2)
        transfer.moved(SLOWEST)
    assert TIMEOUT * 0.9 < waited(transfer) < 1.5 * TIMEOUT


def test_a_trickle_costs_the_timeout() -> None:
    transfer = Transfer(TIMEOUT)
    began = time.monotonic()

    def trickle() -> None:
        while True:
            time.sleep(TICK / 3)
            transfer.moved(1)

    with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.3 s"):
        trickle()
    assert time.monotonic() - began < 1.5 * TIMEOUT


def test_what_moves_fast_enough_may_go_on_for_ever() -> None:
    transfer = Transfer(TIMEOUT)
    for _ in range(40):
        time.sleep(TICK)
        transfer.moved(2 * FAST)


def test_a_backend_that_tells_nothing_has_the_time_that_its_frames_take() -> None:
    transfer = Transfer(TIMEOUT)
    transfer.allocate(int(SLOWEST * TIMEOUT))
    assert 1.9 * TIMEOUT <= waited(transfer) < 2.5 * TIMEOUT


def test_one_that_tells_has_not() -> None:
    transfer = tells(Transfer(TIMEOUT))
    transfer.allocate(int(SLOWEST * TIMEOUT))
    assert TIMEOUT * 0.9 <= waited(transfer) < 1.5 * TIMEOUT


def test_frames_of_a_backend_that_tells_nothing_count_when_they_are_there() -> None:
    transfer = Transfer(TIMEOUT)
    for _ in range(4):
        transfer.allocate(SLOWEST)
        time.sleep(0.6 * TIMEOUT)
        transfer.arrived(SLOWEST)
        transfer.check()


def test_decoding_counts_as_what_the_chunk_has_more_than_its_frame() -> None:
    transfer = tells(Transfer(TIMEOUT))
    for _ in range(5):
        time.sleep(0.6 * TIMEOUT)
        transfer.arrived(100)
        transfer.decoded(int(TIMEOUT * SLOWEST))
        transfer.check()


def test_the_time_of_a_busy_caller_does_not_count(line: Line) -> None:
    transfer = Transfer(TIMEOUT, line, waits=False)
    for _ in range(4):
        time.sleep(0.6 * TIMEOUT)
        with transfer.waiting():
            time.sleep(TICK / 4)
            transfer.check()
    assert line.clock.users == 0


def test_many_that_wait_for_a_trickle_wait_no_longer_than_one(line: Line) -> None:
    transfers = [tells(Transfer(TIMEOUT, line)) for _ in range(8)]
    times: list[float] = []
    threads = [
        threading.Thread(target=lambda each=each: times.append(waited(each))) for each in transfers
    ]
    with each_tick(lambda: transfers[0].decoded(1)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(times) < 1.5 * TIMEOUT


@pytest.fixture
def others(line: Line) -> Iterator[None]:
    """Three other loads, that wait all the time and get what they want."""
    loads = [Transfer(TIMEOUT, line) for _ in range(3)]
    with each_tick(lambda: [load.moved(FAST) for load in loads]):
        yield


@pytest.mark.usefixtures("others")
def test_loads_that_share_a_store_share_the_slowest_rate(line: Line) -> None:
    """Alone, it would have two timeouts for that."""
    transfer = tells(Transfer(TIMEOUT, line))
    for _ in range(5):
        time.sleep(TIMEOUT / 2)
        transfer.moved(int(SLOWEST * TIMEOUT / 8))


@pytest.mark.usefixtures("others")
def test_a_load_that_hangs_among_others_that_flow_is_found_out(line: Line) -> None:
    transfer = tells(Transfer(TIMEOUT, line))
    assert 3 * TIMEOUT < waited(transfer) < 5 * TIMEOUT  # one, shared by four


def test_a_load_that_shared_a_store_is_not_judged_as_if_it_had_been_alone(line: Line) -> None:
    mine, *others = [tells(Transfer(TIMEOUT, line)) for _ in range(4)]
    for _ in range(8):  # two timeouts, of which one half is its own
        time.sleep(TIMEOUT / 4)
        for other in others:
            other.moved(SLOWEST)
    for other in others:
        other.pause()
    assert TIMEOUT / 3 < mine.remaining() <= TIMEOUT


def test_who_is_late_is_over_for_good() -> None:
    transfer = Transfer(TIMEOUT)
    assert str(transfer.late()) == "no answer within 0.3 s"
    transfer.answer = "the server says SlowDown"
    assert str(transfer.late()) == "the server says SlowDown, for 0.3 s"
    with pytest.raises(DeadlineExceeded):
        transfer.moved(SLOWEST)


def test_no_frame_is_larger_than_the_limit() -> None:
    transfer = Transfer(TIMEOUT, limit=100)
    assert transfer.allocate(100).nbytes == 100
    with pytest.raises(StorageError, match="none has more than 100"):
        transfer.allocate(101)
