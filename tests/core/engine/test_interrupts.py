"""Interrupts (Ctrl-C, Jupyter's stop button): raised between any two steps of any call and of any
finalizer, they leave nothing locked, nothing leased, nothing half changed."""

from __future__ import annotations

import gc
import os
import random
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import lmcache_core
from lmcache_core import CacheEngine, Chunk, KVLayout, LayerGroup, Tensors, unverified
from lmcache_core.io.memory import HostBuffers
from lmcache_core.plugins.counters import Counters
from lmcache_core.plugins.events import Missed, Reason

TOKENS, CHUNKS = 8, 4
LAYOUT = KVLayout(
    groups=(
        LayerGroup(
            kind="attention", layers=range(2), kv_heads=2, key_dim=32, value_dim=32, dtype="float32"
        ),
    )
)
CHUNK = LAYOUT.bytes_per_token * TOKENS


@contextmanager
def interrupts() -> Iterator[Callable[[float, Callable[[], object]], bool]]:
    """Gives a function that interrupts work after some seconds, and says whether it did."""
    armed = False

    def interrupt(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    def interrupted(seconds: float, work: Callable[[], object]) -> bool:
        nonlocal armed
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, seconds)
            work()
            armed = False
        except KeyboardInterrupt:
            armed = False
            return True
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        return False

    handler, hook = signal.signal(signal.SIGALRM, interrupt), sys.unraisablehook
    sys.unraisablehook = lambda failure: None  # a finalizer's
    try:
        yield interrupted
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture
def pool() -> Iterator[str]:
    name = f"interrupt-{os.getpid()}-{secrets.token_hex(4)}"
    yield name
    Path(f"/dev/shm/lmcache-{os.getuid()}-{name}").unlink(missing_ok=True)


class User:
    """Stores prompts of a number each, and loads them."""

    def __init__(self, cache: CacheEngine) -> None:
        self.cache = cache
        self.namespace = cache.namespace(model="m", layout=LAYOUT, weights=unverified("w"))

    def keys(self, number: int) -> list[lmcache_core.ChunkKey]:
        return self.cache.keys(self.namespace, [number, *range(1, TOKENS * CHUNKS)])

    def store(self, number: int) -> int:
        def gather(index: int, out: Tensors) -> None:
            for tensor in out.values():
                tensor.fill_(number * CHUNKS + index)

        return self.cache.store(self.namespace, self.keys(number), gather)

    def load(self, number: int) -> int:
        return sum(_is_right(chunk, number) for chunk in self.cache.load(self.keys(number)))


def _is_right(chunk: Chunk, number: int) -> bool:
    right = float(number * CHUNKS + chunk.index)
    assert all(torch.equal(t, torch.full_like(t, right)) for t in chunk.tensors.values())
    return True


@pytest.mark.parametrize("names", ["local_cpu", "shm", "shm local_cpu disk"])
def test_an_interrupted_engine_works_as_before(names: str, pool: str, tmp_path: Path) -> None:
    options = {"shm": {"pool": pool}, "disk": {"path": str(tmp_path)}, "local_cpu": {}}
    capacity = 20 * (CHUNK + 4096)
    tiers: list[dict[str, Any]] = [
        {"backend": name, "capacity": capacity, **options[name]} for name in names.split()
    ]
    chance, hits = random.Random(1), 0
    config = {"chunk_size": TOKENS, "tiers": tiers}
    with lmcache_core.open(config) as cache, interrupts() as interrupted:
        user = User(cache)
        for turn in range(200):
            number = chance.randrange(12)
            work = (user.store, user.load)[turn % 2]
            hits += interrupted(chance.uniform(1e-6, 1e-3), lambda: work(number))  # noqa: B023
        assert hits > 20
        assert cache.flush(20)
        for number in range(12):
            user.load(number)
        assert not any(cache.bypassed(n) for n in range(len(tiers)))
        for number in range(100, 104):
            assert user.store(number) == CHUNKS
            assert user.load(number) == CHUNKS
        assert cache.flush(20)
        gc.collect()
        with lmcache_core.open(config) as other:  # what the first has let go of can be had
            for number in range(200, 210):
                assert User(other).store(number) == CHUNKS
                assert other.flush(20)
    print(f"{names}: {hits} interrupts")


def test_an_interrupted_pool_of_buffers_neither_stops_nor_grows() -> None:
    pool, chance = HostBuffers(keep=16 * 4096), random.Random(2)
    with interrupts() as interrupted:
        for _ in range(500):
            sizes = [4096 * chance.randint(1, 8) for _ in range(8)]
            interrupted(
                chance.uniform(1e-6, 2e-4),
                lambda: [pool.allocate(size) for size in sizes],  # noqa: B023
            )
    assert pool.allocate(4096).nbytes == 4096
    assert pool.free_bytes <= 16 * 4096


def test_interrupted_counters_go_on() -> None:
    counters, chance = Counters(), random.Random(3)
    event = Missed(tier="t", keys=(lmcache_core.ChunkKey(bytes(32)),), reason=Reason.ABSENT)
    with interrupts() as interrupted:
        for _ in range(300):
            interrupted(
                chance.uniform(1e-6, 1e-4),
                lambda: [counters.add(event) or counters.snapshot() for _ in range(20)],
            )
    before = counters.snapshot()[("missed", "absent", "t")]
    counters.add(event)
    assert counters.snapshot()[("missed", "absent", "t")] == before + 1
