"""A capacity that can hold nothing is a config error that says what one chunk takes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lmcache_core
from lmcache_core import ConfigError, Tensors, unverified
from lmcache_core.testing import tiny_layout

SIZE = 4


@pytest.fixture(params=["local_cpu", "disk", "shm"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A tier without a capacity."""
    pool = f"one-chunk-{os.getpid()}"
    own = {"disk": {"path": str(tmp_path)}, "shm": {"pool": pool}}.get(request.param, {})
    yield {"backend": request.param, **own}
    Path(f"/dev/shm/lmcache-{os.getuid()}-{pool}").unlink(missing_ok=True)


def ones(index: int, out: Tensors) -> None:
    for tensor in out.values():
        tensor.fill_(1)


def said(tier: dict[str, Any], capacity: int) -> str:
    """What is wrong with a tier of so many bytes; where nothing is, it holds a chunk."""
    config = {"chunk_size": SIZE, "tiers": [{**tier, "capacity": capacity}]}
    with lmcache_core.open(config) as cache:
        try:
            namespace = cache.namespace(model="m", weights=unverified("w"), layout=tiny_layout())
        except ConfigError as error:
            if tier["backend"] == "shm":
                Path(f"/dev/shm/lmcache-{os.getuid()}-{tier['pool']}").unlink()
            return str(error)
        keys = cache.keys(namespace, range(SIZE))
        cache.store(namespace, keys, ones)
        assert cache.flush(5)
        assert len([chunk.index for chunk in cache.load(keys)]) == 1
    return ""


def test_a_tier_holds_a_chunk_or_says_what_one_takes(tier: dict[str, Any]) -> None:
    payload = SIZE * tiny_layout().bytes_per_token
    error = said(tier, payload)
    assert error.startswith(f"tiers[0].capacity: {payload} bytes hold no chunk; for this model")
    needed = int(re.search(r"take (\d+) bytes", error)[1])  # type: ignore[index]
    assert "hold no chunk" in said(tier, needed - 1)
    assert said(tier, needed) == ""


def test_nobody_knows_what_a_compressed_chunk_takes(tier: dict[str, Any]) -> None:
    config = {"chunk_size": SIZE, "tiers": [{**tier, "capacity": 4096, "serde": ["zstd"]}]}
    with lmcache_core.open(config) as cache:
        layout = tiny_layout()
        cache.namespace(model="m", weights=unverified("w"), layout=layout)
