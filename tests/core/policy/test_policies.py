"""The policies that ship, under the suite that any policy passes."""

from __future__ import annotations

from functools import partial

from lmcache_core.policy.auto import Auto
from lmcache_core.policy.lru import LRU
from lmcache_core.policy.shares import Shares
from lmcache_core.testing.eviction import EvictionConformance


class TestLRU(EvictionConformance):
    policy = LRU


class TestAuto(EvictionConformance):
    policy = Auto


class TestSharesOfLRU(EvictionConformance):
    policy = partial(Shares, make=LRU)


class TestSharesOfAuto(EvictionConformance):
    policy = partial(Shares, make=Auto)
    bytes_a_chunk = 340  # each namespace has a sample of its own
