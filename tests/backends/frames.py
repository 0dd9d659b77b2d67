"""Frames whose key and bytes follow from a number, and what a backend does with them."""

from __future__ import annotations

import random
from collections.abc import Callable

from lmcache_core import ChunkKey
from lmcache_core.backend import StorageBackend, Stored, SupportsScan, Transfer
from lmcache_core.errors import StorageError

LONG = 20.0
SHORT = 0.3
"""Seconds of patience where a fault is to cost it."""
NBYTES = 50_000
"""Of a frame, unless a test says otherwise."""


def key(number: int) -> ChunkKey:
    return ChunkKey(random.Random(number).randbytes(32))


def keys(*numbers: int) -> list[ChunkKey]:
    return [key(n) for n in numbers]


def value(number: int, nbytes: int = NBYTES) -> bytes:
    return random.Random(number).randbytes(nbytes)


def allocate(nbytes: int) -> memoryview:
    return memoryview(bytearray(b"\xee" * nbytes))


class Into(Transfer):
    """A call that reads into what a test allocates."""

    def __init__(self, timeout: float, allocate: Callable[[int], memoryview]) -> None:
        super().__init__(timeout)
        self.allocate = allocate  # type: ignore[method-assign]


def here(backend: StorageBackend, *numbers: int, timeout: float = LONG) -> list[bool]:
    return backend.contains(keys(*numbers), Transfer(timeout))


def put(backend: StorageBackend, *numbers: int, nbytes: int = NBYTES, timeout: float = LONG) -> int:
    frames = [(key(n), [memoryview(value(n, nbytes))]) for n in numbers]
    return backend.put(frames, keys(*numbers), Transfer(timeout))


def get(backend: StorageBackend, *numbers: int, timeout: float = LONG) -> dict[int, bytes]:
    """What came, by number."""
    got = backend.get(keys(*numbers), Transfer(timeout))
    return {numbers[i]: b"".join(parts) for i, parts in got}


def everything(backend: StorageBackend, *numbers: int, nbytes: int = NBYTES) -> bool:
    """Whether all come, each with its own bytes."""
    return get(backend, *numbers) == {n: value(n, nbytes) for n in numbers}


def greet(open_backend: Callable[[], StorageBackend]) -> None:
    """Open it and let its store say whether it may be used, as a tier does."""
    backend = open_backend()
    try:
        backend.ping(Transfer(LONG))
    finally:
        backend.close()


def works(backend: StorageBackend) -> bool:
    try:
        backend.ping(Transfer(SHORT))
    except (StorageError, OSError):
        return False
    return True


def scan(backend: StorageBackend) -> list[Stored]:
    """Every frame that is there."""
    assert isinstance(backend, SupportsScan)
    return list(backend.scan(Transfer(LONG)))
