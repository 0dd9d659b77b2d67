"""Slow is told from hung, however many loads share a store."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from lmcache_core.errors import DeadlineExceeded
from lmcache_core.io.patience import SLOWEST, Flow, Patience

DEADLINE = 0.3
TICK = DEADLINE / 10
FAST = int(2 * SLOWEST * TICK)
"""Bytes a tick at twice the rate that is asked for."""


@pytest.fixture
def flow() -> Flow:
    return Flow(DEADLINE)


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


def soon(box: queue.Queue[str], seconds: float) -> None:
    threading.Timer(seconds, box.put, ["chunk"]).start()


def waited(patience: Patience) -> float:
    """Seconds until a load that never gets anything is told so."""
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"chunks did not come within 0\.3 s"):
        patience.take(queue.Queue())
    return time.monotonic() - began


@pytest.fixture
def others(flow: Flow) -> Iterator[None]:
    """Three other loads, that wait all the time."""
    loads = [Patience(flow) for _ in range(3)]
    boxes: list[queue.Queue[None]] = [queue.Queue() for _ in loads]
    threads = [
        threading.Thread(target=load.take, args=(box,))
        for load, box in zip(loads, boxes, strict=True)
    ]
    with each_tick(lambda: [load.came(FAST) for load in loads]):
        for thread in threads:
            thread.start()
        yield
        for box in boxes:
            box.put(None)
        for thread in threads:
            thread.join()


def test_silence_costs_one_deadline(flow: Flow) -> None:
    assert DEADLINE <= waited(Patience(flow)) < 2 * DEADLINE


def test_silence_costs_one_deadline_whatever_was_promised(flow: Flow) -> None:
    patience = Patience(flow)
    patience.promise(100 * SLOWEST)
    assert DEADLINE <= waited(patience) < 2 * DEADLINE


def test_a_large_frame_may_take_as_long_as_its_bytes_at_the_slowest_rate(flow: Flow) -> None:
    patience, box = Patience(flow), queue.Queue[str]()
    patience.promise(int(4 * DEADLINE * SLOWEST))
    soon(box, 3 * DEADLINE)
    with each_tick(flow.moved):
        assert patience.take(box) == "chunk"


def test_bytes_that_come_too_slowly_are_no_excuse(flow: Flow) -> None:
    patience = Patience(flow)
    patience.promise(int(2 * DEADLINE * SLOWEST))
    with each_tick(flow.moved):
        assert 3 * DEADLINE <= waited(patience) < 4 * DEADLINE


def test_small_chunks_that_dribble_in_cost_one_deadline(flow: Flow) -> None:
    patience = Patience(flow)

    def load() -> None:
        for _ in range(100):
            box = queue.Queue[str]()
            soon(box, 2 * TICK)
            patience.promise(100)
            patience.take(box)
            patience.came(100)

    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        load()
    assert time.monotonic() - began < 3 * DEADLINE


def test_chunks_of_a_store_that_is_fast_enough_may_come_for_ever(flow: Flow) -> None:
    patience = Patience(flow)
    began = time.monotonic()
    while time.monotonic() - began < 4 * DEADLINE:
        box = queue.Queue[str]()
        soon(box, TICK)
        patience.promise(FAST)
        patience.take(box)
        patience.came(FAST)


@pytest.mark.usefixtures("others")
def test_loads_that_share_a_store_share_the_slowest_rate(flow: Flow) -> None:
    patience, box = Patience(flow), queue.Queue[str]()
    patience.promise(int(DEADLINE * SLOWEST))  # alone, it would have two deadlines
    soon(box, 5 * DEADLINE)
    assert patience.take(box) == "chunk"


def test_a_load_that_shared_a_store_is_not_judged_as_if_it_had_been_alone() -> None:
    """The other three got what they wanted in its second deadline; it looks again when it has
    waited for two, and gets its own then."""
    flow = Flow(1.0)
    box, theirs = queue.Queue[str](), queue.Queue[str]()
    others = [threading.Thread(target=Patience(flow).take, args=(theirs,)) for _ in range(3)]
    with each_tick(flow.moved):
        for other in others:
            other.start()
            soon(theirs, 1.6)
        soon(box, 2.1)
        assert Patience(flow).take(box) == "chunk"
    for other in others:
        other.join()


def test_decoding_earns_what_the_chunk_has_more_than_its_frame(flow: Flow) -> None:
    patience = Patience(flow)
    for _ in range(5):
        box = queue.Queue[str]()
        soon(box, 0.6 * DEADLINE)
        with each_tick(flow.moved):
            patience.take(box)
        patience.came(100)
        patience.decoded(int(DEADLINE * SLOWEST))


@pytest.mark.usefixtures("others")
def test_a_load_that_hangs_among_others_that_flow_is_given_up(flow: Flow) -> None:
    assert 3 * DEADLINE < waited(Patience(flow)) < 5 * DEADLINE  # one, shared by four


def test_the_time_of_a_busy_caller_does_not_count(flow: Flow) -> None:
    patience = Patience(flow)
    for _ in range(4):
        time.sleep(0.6 * DEADLINE)
        box = queue.Queue[str]()
        soon(box, TICK / 4)
        assert patience.take(box) == "chunk"


def test_what_is_there_is_taken_though_the_patience_has_ended(flow: Flow) -> None:
    patience, box = Patience(flow), queue.Queue[str]()
    waited(patience)
    box.put("chunk")
    assert patience.take(box) == "chunk"
