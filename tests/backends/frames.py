"""Frames whose key and bytes follow from a number, and what a backend does with them."""

from __future__ import annotations

import random

from lmcache_core import ChunkKey, StorageBackend, StorageError

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


def here(backend: StorageBackend, *numbers: int, timeout: float = LONG) -> list[bool]:
    return backend.contains(keys(*numbers), timeout)


def put(backend: StorageBackend, *numbers: int, nbytes: int = NBYTES, timeout: float = LONG) -> int:
    frames = [(key(n), [memoryview(value(n, nbytes))]) for n in numbers]
    return backend.put(frames, keys(*numbers), timeout)


def get(backend: StorageBackend, *numbers: int, timeout: float = LONG) -> dict[int, bytes]:
    """What came, by number."""
    got = backend.get(keys(*numbers), allocate, timeout)
    return {numbers[i]: b"".join(parts) for i, parts in got}


def everything(backend: StorageBackend, *numbers: int, nbytes: int = NBYTES) -> bool:
    """Whether all come, each with its own bytes."""
    return get(backend, *numbers) == {n: value(n, nbytes) for n in numbers}


def works(backend: StorageBackend) -> bool:
    try:
        backend.ping(SHORT)
    except (StorageError, OSError):
        return False
    return True
