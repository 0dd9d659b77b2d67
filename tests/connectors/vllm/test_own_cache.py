"""What vLLM has in its own prefix cache when weights or an adapter change. Needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lmcache_connectors.vllm.own_cache import OwnCache


class Blocks:
    """VLLM's cache of three blocks."""

    def __init__(self) -> None:
        self.block_pool = SimpleNamespace(blocks=[None] * 3)
        self.evicted = 0

    def evict_blocks(self, blocks: set[int]) -> None:
        assert blocks == {0, 1, 2}
        self.evicted += 1


@pytest.fixture
def blocks() -> Blocks:
    return Blocks()


@pytest.fixture
def cache(blocks: Blocks) -> OwnCache:
    cache = OwnCache()
    cache.blocks = blocks
    return cache


def test_a_change_takes_all_blocks_out(cache: OwnCache, blocks: Blocks) -> None:
    cache.outdate()
    assert (blocks.evicted, cache.outdated) == (1, False)


def test_a_request_that_runs_goes_on_to_fill_blocks_of_old(cache: OwnCache, blocks: Blocks) -> None:
    """Until the last of them is done; what it left is then taken out, too."""
    for name in ("a", "b"):
        cache.begin(name)
    cache.outdate()
    cache.begin("new")
    cache.end("a")
    assert (blocks.evicted, cache.outdated) == (1, True)
    cache.end("b")
    assert (blocks.evicted, cache.outdated) == (2, False)
    cache.end("new")
    assert blocks.evicted == 2


def test_one_that_was_done_before_left_nothing(cache: OwnCache) -> None:
    cache.begin("a")
    cache.end("a")
    cache.outdate()
    assert not cache.outdated


def test_what_cannot_be_taken_out_stays_outdated_until_vllm_does_it() -> None:
    cache = OwnCache()
    cache.outdate()
    assert cache.outdated
    cache.reset()
    assert not cache.outdated
