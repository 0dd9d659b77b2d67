"""Host buffers: where chunks lie between an engine's memory and a tier.

First touch of fresh memory costs many times a copy (page faults), so buffers are reused: a buffer
goes back to the pool when the last view on it is gone. Pinned memory and everything else that
depends on the accelerator stays in this file.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

POOL_BYTES = 256 << 20
"""Free memory that the pool keeps for reuse."""
WARM_BYTES, WARM_BUFFERS = 64 << 20, 64
"""The most that is touched before anybody needs it."""


class HostBuffers:
    """Writable host memory by size; thread-safe. Pinned in a process that uses CUDA: in another,
    such as a scheduler's, that alone would take some of the device's memory."""

    def __init__(self, keep: int = POOL_BYTES) -> None:
        self._keep = keep
        self._empty()

    def _empty(self) -> None:
        """Begin anew; in a forked child, whose parent's threads may have been anywhere in here."""
        self._free: dict[int, list[mmap.mmap]] = {}
        """By size; those that came back last are at the end."""
        self._free_bytes = 0
        self._ended: deque[tuple[int, mmap.mmap]] = deque()
        """Came back, and not yet looked at: a finalizer may run inside any allocation."""
        self._lock = threading.Lock()

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
        weakref.finalize(owner, self._give, size, pages).atexit = False
        return memoryview(owner).cast("B")

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
        return self._free_bytes

    def _take(self, size: int) -> mmap.mmap | None:
        with self._lock:
            over = self._settle()
            free = self._free.get(size)
            pages = free.pop() if free else None
            if pages is not None:
                self._free_bytes -= size
        del over
        return pages

    def _give(self, size: int, pages: mmap.mmap) -> None:
        if size > self._keep:
            return
        self._ended.append((size, pages))
        while self._ended and self._lock.acquire(blocking=False):
            try:
                over = self._settle()
            finally:
                self._lock.release()
            del over

    def _settle(self) -> list[mmap.mmap]:
        """Take in what came back. Returns what there is no room for, of the sizes that have not
        come back for longest: to be unmapped without the lock."""
        while self._ended:
            size, pages = self._ended.popleft()
            free = self._free.pop(size, None) or []
            free.append(pages)
            self._free[size] = free
            self._free_bytes += size
        over: list[mmap.mmap] = []
        while self._free_bytes > self._keep:
            size = next(iter(self._free))
            if self._free[size]:
                over.append(self._free[size].pop(0))
                self._free_bytes -= size
            else:
                del self._free[size]
        return over


def _round_up(nbytes: int) -> int:
    """Whole pages, and at most 1/8 more than asked, so that near sizes share buffers."""
    step = max(mmap.PAGESIZE, 1 << max(nbytes.bit_length() - 4, 0))
    return -(-nbytes // step) * step


def _map(size: int) -> mmap.mmap:
    # Private, so that a forked child that writes to a buffer does not write to its parent's.
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


HOST = HostBuffers()
"""The process's pool."""
os.register_at_fork(after_in_child=HOST._empty)
