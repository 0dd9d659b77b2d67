"""Host buffers: reused when nobody looks at them any more, never before."""

from __future__ import annotations

import os

import numpy as np
import torch

from lmcache_core.memory import HostBuffers

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


def test_a_forked_child_does_not_write_into_its_parents_buffers() -> None:
    buffer = HostBuffers().allocate(4096)
    buffer[0] = 1
    child = os.fork()
    if child == 0:
        buffer[0] = 2
        os._exit(0)
    os.waitpid(child, 0)
    assert buffer[0] == 1
