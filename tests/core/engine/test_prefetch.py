"""prefetch: the stored prefix moves up, in the background, and gives way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lmcache_core
from lmcache_backends.disk import DiskBackend
from lmcache_core import CacheEngine, ChunkKey, Namespace, Tensors

Gather = Callable[[int, Tensors], None]
TOKENS = 8
CHUNKS = 6


@pytest.fixture
def cache(tmp_path: Path, namespace: Namespace, gather: Gather) -> Iterator[CacheEngine]:
    """Empty memory before a disk that has a sequence."""
    disk = {"backend": "disk", "path": str(tmp_path), "capacity": "1MiB"}
    with lmcache_core.open({"chunk_size": TOKENS, "tiers": [disk]}) as cache:
        assert cache.store(namespace, keys_of(cache, namespace), gather) == CHUNKS
    memory = {"backend": "local_cpu", "capacity": "1MiB"}
    with lmcache_core.open({"chunk_size": TOKENS, "tiers": [memory, disk]}) as cache:
        yield cache


@pytest.fixture
def keys(cache: CacheEngine, namespace: Namespace) -> list[ChunkKey]:
    return keys_of(cache, namespace)


def keys_of(cache: CacheEngine, namespace: Namespace) -> list[ChunkKey]:
    return cache.keys(namespace, range(CHUNKS * TOKENS))


def test_what_is_prefetched_comes_from_memory(cache: CacheEngine, keys: list[ChunkKey]) -> None:
    assert set(cache.lookup(keys).tiers) == {1}
    prefetch = cache.prefetch(keys)
    assert prefetch.wait(30.0)
    assert prefetch.done
    assert prefetch.chunks == CHUNKS
    assert cache.lookup(keys).tiers == (0,) * CHUNKS
    again = cache.prefetch(keys)  # nothing is left to do
    assert again.wait(30.0)
    assert again.chunks == CHUNKS
    assert cache.stats()["loaded", "disk"] == CHUNKS


def test_only_what_is_stored_is_prefetched(
    cache: CacheEngine, keys: list[ChunkKey], namespace: Namespace
) -> None:
    longer = cache.keys(namespace, range((CHUNKS + 3) * TOKENS))
    prefetch = cache.prefetch(longer)
    assert prefetch.wait(30.0)
    assert prefetch.chunks == CHUNKS


def slowly(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """The disk's chunks come one by one, each when the semaphore is released."""
    turns, get = threading.Semaphore(0), DiskBackend.get

    def paced(*arguments: Any) -> Iterator[Any]:
        for frame in get(*arguments):
            assert turns.acquire(timeout=30.0)
            yield frame

    monkeypatch.setattr(DiskBackend, "get", paced)
    return turns


def test_a_cancelled_prefetch_ends_with_what_is_under_way(
    cache: CacheEngine, keys: list[ChunkKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = slowly(monkeypatch)
    prefetch = cache.prefetch(keys)
    prefetch.cancel()
    turns.release(CHUNKS)
    assert prefetch.wait(30.0)
    assert prefetch.chunks < CHUNKS


def test_a_load_goes_before_it(cache: CacheEngine, keys: list[ChunkKey]) -> None:
    """While somebody loads, no more than a chunk comes."""
    load = cache.load(keys[:1])
    next(load)
    prefetch = cache.prefetch(keys)
    assert not prefetch.wait(0.2)
    assert prefetch.chunks <= 2
    assert not list(load)
    assert prefetch.wait(30.0)
    assert prefetch.chunks == CHUNKS


def test_closing_cancels_it(
    cache: CacheEngine, keys: list[ChunkKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = slowly(monkeypatch)
    prefetches = [cache.prefetch(keys[:n]) for n in range(1, CHUNKS)]
    turns.release(CHUNKS * CHUNKS)
    cache.close()
    assert all(prefetch.wait(30.0) for prefetch in prefetches)
    late = cache.prefetch(keys)
    assert late.done
    assert late.chunks == 0
