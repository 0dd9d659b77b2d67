"""A capacity that can hold nothing is a config error that says what one chunk takes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lmcache_core
from lmcache_core import ConfigError, Tensors, unverified
from lmcache_core.engine import write_behind
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


def noise(index: int, out: Tensors) -> None:
    for tensor in out.values():
        tensor.copy_(torch.rand(tensor.shape))


def test_what_a_compressed_chunk_takes_is_known_when_it_is_stored(
    tier: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """And nobody has to wonder why none is ever loaded."""
    one = {**tier, "capacity": 4096, "serde": ["zstd"], "name": f"small {tier['backend']}"}
    with lmcache_core.open({"chunk_size": 256, "tiers": [one]}) as cache:
        namespace = cache.namespace(model="m", weights=unverified("w"), layout=tiny_layout())
        keys = cache.keys(namespace, range(256))
        cache.store(namespace, keys, noise)
        assert cache.flush(5)
        assert cache.lookup(keys).chunks == 0
    said = (
        rf"tier small {tier['backend']}: tiers\[0\].capacity: 4096 bytes hold no chunk of \d+ bytes"
    )
    assert re.search(said, caplog.text)


def test_a_prompt_larger_than_a_slow_tier_displaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is stored a few chunks at a time."""
    monkeypatch.setattr(write_behind, "BATCH_BYTES", 1)
    layout = tiny_layout()
    frame = SIZE * layout.bytes_per_token + 1024
    disk = {"backend": "disk", "path": str(tmp_path), "capacity": 10 * frame}
    with lmcache_core.open({"chunk_size": SIZE, "tiers": [disk]}) as cache:
        namespace = cache.namespace(model="m", weights=unverified("w"), layout=layout)
        old = cache.keys(namespace, range(1000, 1000 + 6 * SIZE))
        large = cache.keys(namespace, range(40 * SIZE))
        for keys in (old, large):
            cache.store(namespace, keys, ones)
            assert cache.flush(10)
        assert cache.lookup(old).chunks == 6
        assert 0 < cache.lookup(large).chunks < 40
