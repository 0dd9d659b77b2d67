"""hint: what a caller says of a sequence decides who leaves first, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import lmcache_core
from lmcache_core import CacheEngine, ChunkKey, Namespace, Tensors
from lmcache_core.frames.frame import raw_bytes
from lmcache_core.frames.pipeline import Pipeline

Gather = Callable[[int, Tensors], None]
TOKENS = 8


@pytest.fixture(params=["auto", "lru"])
def cache(request: pytest.FixtureRequest, namespace: Namespace) -> Iterator[CacheEngine]:
    """Memory for ten chunks."""
    tier = {
        "backend": "local_cpu",
        "capacity": 10 * raw_bytes(namespace, TOKENS, Pipeline([])),
        "eviction": request.param,
    }
    with lmcache_core.open({"chunk_size": TOKENS, "tiers": [tier]}) as cache:
        yield cache


def stored(
    cache: CacheEngine, namespace: Namespace, gather: Gather, *chunks: int
) -> list[ChunkKey]:
    """A sequence whose chunks are told apart by these numbers."""
    keys = cache.keys(namespace, [n for n in chunks for _ in range(TOKENS)])
    cache.store(namespace, keys, gather)
    return keys


def test_a_chat_that_is_over_leaves_first_but_for_what_others_share(
    cache: CacheEngine, namespace: Namespace, gather: Gather
) -> None:
    old = stored(cache, namespace, gather, 1, 2, 3, 4)
    over = stored(cache, namespace, gather, 1, 2, 5, 6, 7, 8)
    assert cache.lookup(over).chunks == 6
    cache.hint(over, "done")
    stored(cache, namespace, gather, 90, 91, 92, 93, 94)
    assert cache.lookup(old).chunks == 4  # older, and still going on
    assert cache.lookup(over).chunks < 6


def test_without_a_hint_the_older_leaves(
    cache: CacheEngine, namespace: Namespace, gather: Gather
) -> None:
    old = stored(cache, namespace, gather, 1, 2, 3, 4)
    new = stored(cache, namespace, gather, 5, 6, 7, 8)
    stored(cache, namespace, gather, 90, 91, 92, 93, 94)
    assert cache.lookup(old).chunks < 4
    assert cache.lookup(new).chunks == 4


def test_a_hint_on_what_nobody_has_or_to_a_store_that_takes_none_changes_nothing(
    cache: CacheEngine, namespace: Namespace
) -> None:
    keys = cache.keys(namespace, range(5 * TOKENS))
    for hint in ("done", "waiting", "once"):
        cache.hint(keys, hint)
    assert cache.lookup(keys).chunks == 0
