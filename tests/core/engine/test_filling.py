"""What a gather leaves unfilled is never another request's, and what a caller does to what it was
given is nobody else's."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lmcache_core
from lmcache_core import (
    CacheEngine,
    Chunk,
    KVLayout,
    LayerGroup,
    Namespace,
    Tensors,
    copy_exact,
    unverified,
)
from lmcache_core.connector import LOG, whole
from lmcache_core.engine import engine
from lmcache_core.engine.write_behind import WriteBehind
from lmcache_core.io.memory import HostBuffers
from lmcache_core.kv import filling

TOKENS = 16
GROUPS = (
    LayerGroup(
        kind="attention", layers=range(3), kv_heads=2, key_dim=8, value_dim=4, dtype="float32"
    ),
    LayerGroup(kind="mla", layers=[3], kv_heads=1, key_dim=16, value_dim=0, dtype="bfloat16"),
)
SECRET = 7.0
"""What is in host memory of another request."""
Gather = Callable[[int, Tensors], Any]


def opened(*tiers: dict[str, Any]) -> CacheEngine:
    memory = {"backend": "local_cpu", "capacity": "8MiB"}
    return lmcache_core.open({"chunk_size": TOKENS, "tiers": [*(tiers or [memory])]})


def namespace() -> Namespace:
    return Namespace(model="m", layout=KVLayout(groups=GROUPS), weights=unverified("w"))


@pytest.fixture(autouse=True)
def _used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer was another request's."""
    LOG._seen.clear()
    allocate = HostBuffers.allocate

    def used(pool: HostBuffers, nbytes: int) -> memoryview:
        buffer = allocate(pool, nbytes)
        np.frombuffer(buffer, np.float32)[:] = SECRET  # as half of all bfloat16 too
        return buffer

    monkeypatch.setattr(HostBuffers, "allocate", used)


def stored(cache: CacheEngine, gather: Gather, chunks: int = 2, seed: int = 0) -> list[Tensors]:
    name = namespace()
    keys = name.keys([seed, *range(1, TOKENS * chunks)], TOKENS)
    cache.store(name, keys, gather)
    assert cache.flush(10)
    return [chunk.tensors for chunk in cache.load(keys)]


def by_copy_exact(index: int, out: Tensors) -> None:
    for tensor in out.values():
        for tokens in range(0, TOKENS, 4):
            copy_exact(tensor[:, :, tokens : tokens + 4], torch.ones_like(tensor[:, :, :4]))


def by_fill(index: int, out: Tensors) -> None:
    for tensor in out.values():
        tensor.fill_(1)


def by_numpy(index: int, out: Tensors) -> None:
    for tensor in out.values():
        tensor.view(torch.uint8).numpy()[:] = 0x3F


def by_other_order(index: int, out: Tensors) -> None:
    for tensor in out.values():
        view = tensor.permute(2, 0, 3, 1)
        copy_exact(view, torch.ones(view.shape, dtype=view.dtype))


@pytest.mark.parametrize("gather", [by_copy_exact, by_fill, by_numpy, by_other_order])
def test_what_is_filled_is_stored_however_it_is_filled(gather: Gather) -> None:
    with opened() as cache:
        for seed in range(3):
            found = stored(cache, gather, seed=seed)
            assert len(found) == 2
            assert not any((t == SECRET).any() for tensors in found for t in tensors.values())


PARTS = {
    "nothing": lambda tensor: tensor[:0],
    "all but a layer": lambda tensor: tensor[1:],
    "all but a head": lambda tensor: tensor[:, 1:],
    "all but the last token": lambda tensor: tensor[:, :, :-1],
    "one layer": lambda tensor: tensor[:1],
    "half the tokens": lambda tensor: tensor[:, :, ::2],
    "half of each vector": lambda tensor: tensor[..., :2],
    "all but a vector": lambda tensor: tensor.flatten(0, 2)[1:],
}


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["g0.k", "g0.v", "g1.k"])
def test_what_is_left_unfilled_is_found_or_zero(
    name: str, part: str, exactly: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def gather(index: int, out: Tensors) -> None:
        for key, tensor in out.items():
            some = PARTS[part](tensor) if key == name and self["partly"] else tensor
            if exactly:
                copy_exact(some, torch.ones_like(some))
            else:
                some.fill_(1)

    self = {"partly": False}
    with opened() as cache:
        assert len(stored(cache, gather)) == 2
        self["partly"] = True
        found = stored(cache, gather, seed=1)
        for tensors in found:
            for tensor in tensors.values():
                assert ((tensor == 1) | (tensor == 0)).all()
        dropped = cache.stats().get(("dropped", "unfilled", "local_cpu"), 0)
        assert len(found) == 2 - dropped
        if (name, part) == ("g1.k", "one layer"):  # it has no other
            assert dropped == 0
        else:
            assert part == "all but a vector" or dropped == 2
        assert ("unfilled" in caplog.text) == (dropped > 0)


def test_one_part_twice_in_place_of_another_is_no_whole() -> None:
    tensors = {"g0.k": torch.zeros(2, 3, 8, 4), "g0.v": torch.zeros(2, 3, 8, 4)}
    for twice, never in ((0, 1), (0, 7), (3, 4), (7, 0)):
        with filling.Filling(tensors) as seen:
            for tensor in tensors.values():
                for token in range(8):
                    place = twice if token == never else token
                    copy_exact(tensor[:, :, place], torch.ones(2, 3, 4))
        assert not seen.whole
    with filling.Filling(tensors) as seen:
        for tensor in tensors.values():
            copy_exact(tensor, torch.ones_like(tensor))
        copy_exact(torch.zeros(2), torch.ones(2))  # somewhere else
    assert seen.whole


def test_a_gather_that_is_known_to_fill_all_is_called_once_and_nothing_is_cleared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def gather(index: int, out: Tensors) -> None:
        calls.append(index)
        by_copy_exact(index, out)

    cleared: list[Tensors] = []
    clear = filling.clear
    monkeypatch.setattr(filling, "clear", lambda tensors: (cleared.append(tensors), clear(tensors)))
    with opened() as cache:
        for seed in range(3):
            stored(cache, gather, seed=seed)
        assert calls == [0, 1] * 3
        assert len(cleared) == 1
        calls.clear()
        stored(cache, whole(lambda index, out: calls.append(index)), seed=9)  # its author's word
        assert calls == [0, 1]
        assert len(cleared) == 1


def test_other_tensors_put_in_place_of_those_given_are_not_stored() -> None:
    def gather(index: int, out: dict[str, torch.Tensor]) -> None:
        for name in out:
            out[name] = torch.ones_like(out[name])

    with opened() as cache:
        assert stored(cache, gather) == []


KINDS = [
    "local_cpu",
    "shm",
    "disk",
    "local_cpu disk",
    "disk local_cpu",
    "shm disk",
    "shm local_cpu",
]


@pytest.fixture(params=KINDS)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CacheEngine]:
    pool = f"given-{os.getpid()}"
    options = {"shm": {"pool": pool}, "disk": {"path": str(tmp_path)}, "local_cpu": {}}
    tiers = [{"backend": n, "capacity": "8MiB", **options[n]} for n in request.param.split()]
    with opened(*tiers) as cache:
        yield cache
    Path(f"/dev/shm/lmcache-{os.getuid()}-{pool}").unlink(missing_ok=True)


def scribble(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor.fill_(SECRET)


def test_what_a_caller_does_to_what_it_was_given_changes_nothing_for_the_next(
    cache: CacheEngine,
) -> None:
    name = namespace()
    keys = name.keys(range(TOKENS * 4), TOKENS)
    given: list[Tensors] = []

    def gather(index: int, out: Tensors) -> None:
        by_fill(index, out)
        given.append(dict(out))
        part = next(iter(out.values()))[0, :, 1:]
        given.append({"a part": part})

    cache.store(name, keys, gather)
    for tensors in given:
        scribble(tensors)
    for _ in range(3):  # from the queue, from the store, from where it was promoted to
        chunks = list(cache.load(keys))
        assert len(chunks) == 4
        for chunk in chunks:
            assert all((tensor == 1).all() for tensor in chunk.tensors.values())
            scribble(chunk.tensors)
        assert cache.flush(10)


def test_what_is_in_the_queue_is_not_handed_out(tmp_path: Path, monkeypatch: Any) -> None:
    write, go = WriteBehind._store, threading.Event()
    monkeypatch.setattr(WriteBehind, "_store", lambda *args: (go.wait(30), write(*args)))
    disk = {"backend": "disk", "path": str(tmp_path), "capacity": "8MiB"}
    name = namespace()
    keys = name.keys(range(TOKENS * 2), TOKENS)
    with opened(disk) as cache:
        cache.store(name, keys, by_fill)
        for chunk in cache.load(keys):
            scribble(chunk.tensors)
        go.set()
        assert cache.flush(10)
        found = [chunk.tensors for chunk in cache.load(keys)]
        assert len(found) == 2
        assert all((tensor == 1).all() for tensors in found for tensor in tensors.values())


def test_a_gather_that_keeps_what_it_was_given_is_told_and_others_cost_no_copy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copies: list[Chunk] = []
    own = engine._own
    monkeypatch.setattr(engine, "_own", lambda chunk: (copies.append(chunk), own(chunk))[1])
    kept: list[Tensors] = []
    with opened() as cache:
        keys = namespace().keys(range(TOKENS * 2), TOKENS)
        for gather in (by_copy_exact, by_fill, by_numpy, by_other_order):
            cache.store(namespace(), keys, gather)
        assert not copies
        keys = namespace().keys(range(1, TOKENS * 2 + 1), TOKENS)
        cache.store(namespace(), keys, lambda index, out: (by_fill(index, out), kept.append(out)))
    assert len(copies) == 2
    assert "keeps tensors that it was given; they are copied" in caplog.text
