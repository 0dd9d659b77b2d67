"""Host buffers: reused when nobody looks at them any more, never before."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import resource
import sys
from typing import Any

import numpy as np
import pytest
import torch

from lmcache_core.io.memory import WARM_BUFFERS, WARM_BYTES, HostBuffers

MIB = 1 << 20


def address(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def test_a_buffer_has_exactly_the_size_asked_for() -> None:
    for nbytes in (0, 1, 4095, 4096, 4097, MIB + 1):
        buffer = HostBuffers().allocate(nbytes)
        assert buffer.nbytes == nbytes
        assert not buffer.readonly
        buffer[:] = b"\1" * nbytes


def test_memory_is_reused_once_the_last_view_is_gone() -> None:
    pool = HostBuffers()
    buffer = pool.allocate(MIB)
    where = address(buffer)
    tensor = torch.frombuffer(buffer[10:], dtype=torch.uint8)
    view = tensor[5:]
    del buffer, tensor
    assert address(pool.allocate(MIB)) != where
    del view
    assert address(pool.allocate(MIB)) == where


def test_what_was_got_ahead_is_touched_and_waits() -> None:
    pool = HostBuffers()
    pool.warm([MIB, 3 * MIB])
    assert pool.free_bytes == WARM_BYTES
    buffers = [pool.allocate(nbytes) for nbytes in (MIB, 3 * MIB) for _ in range(16)]
    assert pool.free_bytes == 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for buffer in buffers:
        np.frombuffer(buffer, np.uint8)[:: mmap.PAGESIZE] = 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100
    pool.warm([])


def test_little_is_got_ahead_of_small_buffers() -> None:
    pool = HostBuffers()
    pool.warm([4096])
    assert pool.free_bytes == WARM_BUFFERS * 4096
    pool.warm([WARM_BYTES + 1])
    assert pool.free_bytes == WARM_BUFFERS * 4096


def test_where_there_is_no_more_memory_none_is_got_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(size: int) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("lmcache_core.io.memory._map", none)
    pool = HostBuffers()
    pool.warm([MIB])
    assert pool.free_bytes == 0


def test_the_pool_keeps_no_more_than_it_may() -> None:
    pool = HostBuffers(keep=2 * MIB)
    buffers = [pool.allocate(MIB) for _ in range(5)]
    assert pool.free_bytes == 0
    del buffers
    assert pool.free_bytes == 2 * MIB


def test_a_buffer_that_comes_back_takes_the_place_of_those_nobody_asks_for() -> None:
    pool = HostBuffers(keep=4 * MIB)
    burst = [pool.allocate(MIB) for _ in range(8)]
    del burst
    buffer = pool.allocate(3 * MIB)
    where = address(buffer)
    del buffer
    assert pool.free_bytes == 4 * MIB
    assert address(pool.allocate(3 * MIB)) == where


def test_a_buffer_larger_than_the_pool_costs_it_nothing() -> None:
    pool = HostBuffers(keep=4 * MIB)
    small = pool.allocate(MIB)
    del small
    large = pool.allocate(5 * MIB)
    del large
    assert pool.free_bytes == MIB


def test_buffers_may_die_inside_the_pool_itself() -> None:
    """The collector runs wherever something is allocated."""
    pool, lost, chance = HostBuffers(keep=64 * 4096), [], random.Random(1)
    unraisable, sys.unraisablehook = sys.unraisablehook, lost.append
    threshold = gc.get_threshold()
    try:
        for _ in range(6000):
            gc.set_threshold(chance.randint(1, 60))
            for _ in range(chance.randint(0, 3)):
                cycle: list[Any] = [pool.allocate(4096 * chance.randint(1, 40))]
                cycle.append(cycle)
            pool.allocate(4096 * chance.randint(1, 40))
    finally:
        gc.set_threshold(*threshold)
        del cycle
        gc.collect()
        sys.unraisablehook = unraisable
    assert not lost
    assert pool.free_bytes <= 64 * 4096
    assert sum(size * len(free) for size, free in pool._free.items()) == pool.free_bytes


def test_a_forked_child_does_not_write_into_its_parents_buffers() -> None:
    buffer = HostBuffers().allocate(4096)
    buffer[0] = 1
    child = os.fork()
    if child == 0:
        buffer[0] = 2
        os._exit(0)
    os.waitpid(child, 0)
    assert buffer[0] == 1
