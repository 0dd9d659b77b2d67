"""The copy budget: raw KV from an engine to any tier and back is copied by the kernel alone."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import lmcache_core
from lmcache_core import KVLayout, LayerGroup, Tensors, unverified
from lmcache_core.io.memory import HOST, HostBuffers

TOKENS = 64
CHUNKS = 12
LAYOUT = KVLayout(
    groups=(
        LayerGroup(
            kind="attention", layers=(0, 1, 2, 3), kv_heads=8, key_dim=64, value_dim=64,
            dtype="bfloat16",
        ),
    )
)  # fmt: skip
CHUNK = LAYOUT.bytes_per_token * TOKENS


class Allocations:
    """Host buffers that were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        real = HostBuffers.allocate

        def counting(pool: HostBuffers, nbytes: int) -> memoryview:
            self.sizes.append(nbytes)
            return real(pool, nbytes)

        monkeypatch.setattr(HostBuffers, "allocate", counting)

    def take(self) -> list[int]:
        sizes, self.sizes = self.sizes, []
        return sizes


@contextmanager
def no_bytes_objects(limit: int) -> Iterator[None]:
    """A copy in Python (bytes, bytearray, join) would be traced; host buffers are not."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit


@pytest.mark.parametrize("tier", ["local_cpu", "disk"])
def test_one_buffer_a_chunk_each_way_and_nothing_else(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"local_cpu": {}, "disk": {"path": str(tmp_path)}}[tier]
    config = {"backend": tier, "capacity": "64MiB", **options}
    with lmcache_core.open({"chunk_size": TOKENS, "tiers": [config]}) as cache:
        namespace = cache.namespace(model="m", layout=LAYOUT, weights=unverified("test"))
        keys = cache.keys(namespace, list(range(TOKENS * CHUNKS)))

        def gather(index: int, out: Tensors) -> None:
            for tensor in out.values():
                tensor.fill_(index)

        warm = cache.keys(namespace, [1] * TOKENS)  # imports, caches, threads
        cache.store(namespace, warm, gather)
        cache.flush()
        list(cache.load(warm))
        allocations = Allocations(monkeypatch)
        with no_bytes_objects(CHUNK // 2):
            cache.store(namespace, keys, gather)
            cache.flush()
        assert allocations.take() == [CHUNK] * CHUNKS
        with no_bytes_objects(CHUNK // 2):
            for chunk in cache.load(keys, shared=True):
                assert chunk.tensors["g0.v"][0, 0, 0, 0] == chunk.index
        read = allocations.take()
        if tier == "local_cpu":
            assert read == []
        else:
            assert len(read) == CHUNKS
            assert all(CHUNK < nbytes < CHUNK + 4096 for nbytes in read)


def test_a_stream_of_chunks_reuses_its_memory(tmp_path: Path) -> None:
    """A load much larger than memory goes through a handful of buffers."""
    tier = {"backend": "disk", "path": str(tmp_path), "capacity": "64MiB"}
    with lmcache_core.open({"chunk_size": TOKENS, "tiers": [tier]}) as cache:
        namespace = cache.namespace(model="m", layout=LAYOUT, weights=unverified("test"))
        keys = cache.keys(namespace, list(range(TOKENS * 50)))
        cache.store(namespace, keys, lambda index, out: [t.zero_() for t in out.values()])
        cache.flush()
        seen: set[int] = set()
        for chunk in cache.load(keys, shared=True):
            seen.add(chunk.tensors["g0.k"].untyped_storage().data_ptr())
            del chunk
        assert len(seen) <= 12
    assert HOST.free_bytes > 0
