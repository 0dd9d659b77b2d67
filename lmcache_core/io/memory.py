"""Host buffers: where chunks lie between an engine's memory and a tier.

First touch of fresh memory costs many times a copy (page faults), so buffers are reused: a buffer
goes back to the pool when the last view on it is gone. Pinned memory and everything else that
depends on the accelerator stays in this file.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lmcache_core.io import process

POOL_BYTES = 256 << 20
"""Free memory that the pool keeps for reuse."""
WARM_BYTES, WARM_BUFFERS = 64 << 20, 64
"""The most that is touched before anybody needs it."""


_FEW = 256
"""Buffers that are lent out, for which it is not worth to look whether they still are."""


class _Lent(weakref.ref[Any]):
    """A buffer that is lent out."""

    __slots__ = ("pages", "size")
    size: int
    pages: mmap.mmap


class HostBuffers:
    """Writable host memory by size; thread-safe. Pinned in a process that uses CUDA: in another,
    such as a scheduler's, that alone would take some of the device's memory.

    There is no lock. A buffer may come back in the middle of any call, this class's included, and
    an interrupt (Ctrl-C) or a fork may come between any two lines. So each step is one call of a
    deque's or a dict's, nothing is counted along, and who meets another is left with less to reuse.
    """

    def __init__(self, keep: int = POOL_BYTES) -> None:
        self._keep = keep
        self._free: dict[int, deque[mmap.mmap]] = {}
        """By size; those that came back last are at the end."""
        self._lent: dict[int, _Lent] | None = {}
        """By identity; None when nothing is to come back any more."""
        self._sweep_at = _FEW

    def allocate(self, nbytes: int) -> memoryview:
        """A buffer of `nbytes` bytes, contents undefined, owned by its views.

        It is reused once every memoryview, array and tensor on it is gone.
        """
        if nbytes == 0:
            return memoryview(bytearray())
        if torch.cuda.is_initialized():
            # torch pools pinned memory itself
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy().data
        size = _round_up(nbytes)
        pages = self._take(size) or _map(size)
        # A ctypes array is an exporter that can be watched: views hold it, and only it.
        owner = (ctypes.c_ubyte * nbytes).from_buffer(pages)
        table = self._lent
        if table is None:
            process.keep(pages)
        else:
            lent = _Lent(owner, self._back)
            lent.size, lent.pages = size, pages
            table[id(lent)] = lent
            if len(table) > self._sweep_at:
                self._sweep(table)
        return memoryview(owner).cast("B")

    def end(self, seconds: float) -> None:
        """Take nothing back and unmap nothing any more: the interpreter ends. What runs when a
        tensor dies runs within C++, where the end aborts when it stops a thread that waits for its
        turn in Python. Waits for threads that are in the middle of that."""
        lent, self._lent = self._lent, None
        process.keep([each.pages for each in list((lent or {}).values())])
        end = time.monotonic() + seconds
        while _takes_back() and time.monotonic() < end:
            time.sleep(0.001)

    def _back(self, lent: _Lent) -> None:
        """A buffer's last view is gone."""
        table = self._lent
        if table is not None and table.pop(id(lent), None) is lent:
            self._give(lent.size, lent.pages)

    def _sweep(self, table: dict[int, _Lent]) -> None:
        """Take back what an interrupt kept from coming back."""
        for lent in list(table.values()):
            if lent() is None:
                self._back(lent)
        self._sweep_at = _FEW + 2 * len(table)

    def warm(self, sizes: Sequence[int]) -> None:
        """Get buffers of these sizes in bytes, in turn, from the system, to wait for use. That
        takes longer than reading into them."""
        held, left = [], WARM_BYTES
        for size in itertools.islice(itertools.cycle(sizes), WARM_BUFFERS):
            left -= size
            if left < 0:
                return
            try:
                held.append(self.allocate(size))
            except (OSError, MemoryError, RuntimeError):  # the system, or the driver, has no more
                return
            np.frombuffer(held[-1], np.uint8)[:: mmap.PAGESIZE] = 0

    @property
    def free_bytes(self) -> int:
        """Bytes that wait for reuse."""
        return sum(size * len(self._free.get(size, ())) for size in tuple(self._free))

    def _take(self, size: int) -> mmap.mmap | None:
        with contextlib.suppress(KeyError, IndexError):
            return self._free[size].pop()
        return None

    def _give(self, size: int, pages: mmap.mmap) -> None:
        if size > self._keep:
            return
        free = self._free.pop(size, None) or deque()
        free.append(pages)
        self._free[size] = free
        surplus = self.free_bytes - self._keep
        while surplus > 0 and self._free:
            surplus -= self._unmap_one()

    def _unmap_one(self) -> int:
        """Let go of a buffer of the size that has not come back for longest; returns its bytes."""
        for size in tuple(self._free):
            with contextlib.suppress(KeyError, IndexError):
                self._free[size].popleft()
                return size
            self._free.pop(size, None)
        return 0


def _takes_back() -> bool:
    """Whether a thread is in the middle of taking a buffer back."""
    frames = list(sys._current_frames().values())
    while frames:
        frame = frames.pop()
        if frame.f_code is HostBuffers._back.__code__:
            return True
        frames += [frame.f_back] if frame.f_back else []
    return False


def _round_up(nbytes: int) -> int:
    """Whole pages, and at most 1/8 more than asked, so that near sizes share buffers."""
    step = max(mmap.PAGESIZE, 1 << max(nbytes.bit_length() - 4, 0))
    return -(-nbytes // step) * step


def _map(size: int) -> mmap.mmap:
    # Private, so that a forked child that writes to a buffer does not write to its parent's.
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


HOST = HostBuffers()
"""The process's pool."""
