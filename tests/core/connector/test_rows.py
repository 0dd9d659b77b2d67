"""Rows: an engine's own memory behind a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lmcache_core
from lmcache_core import CacheEngine, ConfigError, unverified
from lmcache_core.connector import Rows

HASHES = [bytes([n]) * 32 for n in range(6)]
FIELDS = {"model": "toy", "weights": unverified("w")}


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[CacheEngine]:
    tiers = [
        {"backend": "local_cpu", "capacity": "1MiB"},
        {"backend": "disk", "path": str(tmp_path / "kv"), "capacity": "1MiB"},
    ]
    with lmcache_core.open({"chunk_size": 1, "tiers": tiers}) as engine:
        yield engine


def memory() -> torch.Tensor:
    return torch.randint(0, 256, (8, 96), dtype=torch.uint8)


def test_what_was_stored_comes_back_to_other_rows(cache: CacheEngine) -> None:
    source, target = memory(), torch.zeros(8, 96, dtype=torch.uint8)
    one, two = Rows(source, cache, FIELDS), Rows(target, cache, FIELDS)
    keys = one.keys(HASHES[:4])
    assert one.contains(keys) == [False] * 4
    one.store(keys, 0, [3, 1, 0, 7])
    assert two.contains(keys) == [True] * 4
    assert two.load(keys, 1, [5, 6, 2]) == 3
    assert torch.equal(target[[5, 6, 2]], source[[1, 0, 7]])


def test_a_row_that_is_not_there_ends_a_load(cache: CacheEngine) -> None:
    rows = Rows(memory(), cache, FIELDS)
    keys = rows.keys(HASHES[:3])
    rows.store(keys[:2], 0, [0, 1])
    assert rows.load(keys, 0, [4, 5, 6]) == 2


def test_under_another_name_nothing_is_found(cache: CacheEngine) -> None:
    rows = Rows(memory(), cache, FIELDS)
    rows.store(rows.keys(HASHES[:1]), 0, [0])
    rows.rename(adapter="other")
    assert rows.contains(rows.keys(HASHES[:1])) == [False]


def test_chunks_must_be_rows() -> None:
    tiers = [{"backend": "local_cpu", "capacity": "1MiB"}]
    with (
        lmcache_core.open({"chunk_size": 16, "tiers": tiers}) as engine,
        pytest.raises(ConfigError, match="chunk_size: expected 1"),
    ):
        Rows(memory(), engine, FIELDS)
