"""local_cpu: the conformance suite, and that it is as cheap as a dictionary."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable

import pytest

from lmcache_backends.local_cpu import LocalCpuBackend, LocalCpuOptions
from lmcache_core import ChunkKey
from lmcache_core.backend import StorageBackend, Transfer
from lmcache_core.errors import UnknownComponent
from lmcache_core.testing import SMALL, BackendConformance
from tests.backends.frames import Into

GIB = 1 << 30


class RawDict:
    """The backend's own dictionary."""

    def __init__(self) -> None:
        self.backend: LocalCpuBackend | None = None

    def read(self, key: ChunkKey) -> bytes | None:
        parts = self.backend._index.policy.get(key)
        return None if parts is None else b"".join(parts)

    def write(self, key: ChunkKey, value: bytes) -> None:
        assert self.backend._index.add([key], key, (memoryview(value),), len(value), [])

    def keys(self) -> set[ChunkKey]:
        return set(self.backend._index.policy)


class TestLocalCpu(BackendConformance):
    bounded = True

    @pytest.fixture
    def raw(self) -> RawDict:
        return RawDict()

    @pytest.fixture
    def open_backend(self, raw: RawDict) -> Callable[[], StorageBackend]:
        def opened() -> StorageBackend:
            raw.backend = LocalCpuBackend(LocalCpuOptions(capacity=GIB))
            return raw.backend

        return opened

    @pytest.fixture
    def open_small(self) -> Callable[[], StorageBackend]:
        return lambda: LocalCpuBackend(LocalCpuOptions(capacity=SMALL))


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(32, "little"))


def test_it_keeps_the_very_buffer_that_it_was_given() -> None:
    backend = LocalCpuBackend(LocalCpuOptions(capacity=GIB))
    buffer = bytearray(1000)
    backend.put([(key(1), [memoryview(buffer)])], [key(1)], Transfer(1.0))
    buffer[7] = 99
    ((_, parts),) = backend.get([key(1)], Into(1.0, lambda n: pytest.fail("no buffer is needed")))
    assert parts[0][7] == 99


def test_the_index_takes_less_than_300_bytes_a_chunk() -> None:
    backend = LocalCpuBackend(LocalCpuOptions(capacity=GIB))
    count = 20_000
    shared = (memoryview(b"x"),)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(count):
        each = ChunkKey(bytes(16) + hashlib.blake2b(b"%d" % number, digest_size=16).digest())
        backend._index.add([each], each, shared, 1, [])
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) / count < 300


def test_tenants_with_equal_rights_keep_theirs_beside_a_greedy_one() -> None:
    options = LocalCpuOptions(capacity=1000, tenants="equal")
    backend = LocalCpuBackend(options)
    modest = [ChunkKey(b"modest".ljust(16) + bytes([n]) * 16) for n in range(5)]
    backend.put([(each, [memoryview(bytes(10))]) for each in modest], modest, Transfer(1.0))
    for number in range(1000):
        greedy = ChunkKey(b"greedy".ljust(16) + number.to_bytes(16, "little"))
        backend.put([(greedy, [memoryview(bytes(10))])], [greedy], Transfer(1.0))
    assert all(backend.contains(modest, Transfer(1.0)))
    assert sum(stored.nbytes for stored in backend.scan(Transfer(1.0))) == 1000


def test_a_closed_backend_holds_no_memory() -> None:
    backend = LocalCpuBackend(LocalCpuOptions(capacity=GIB))
    buffer = bytearray(1000)
    backend.put([(key(1), [memoryview(buffer)])], [key(1)], Transfer(1.0))
    with pytest.raises(BufferError):
        buffer.extend(b"x")  # somebody still looks at it
    backend.close()
    buffer.extend(b"x")


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(
        UnknownComponent, match="unknown eviction policy 'lru2', did you mean 'lru'"
    ):
        LocalCpuBackend(LocalCpuOptions(capacity=1, eviction="lru2"))
