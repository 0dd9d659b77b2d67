"""Unreadable is absent: fleets of two over one store, each way, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import redis

import lmcache_core
from lmcache_core import CacheEngine, Chunk, ChunkKey, Namespace, Tensors
from lmcache_core.engine import unreadable
from lmcache_core.engine.unreadable import Unreadable
from lmcache_core.frames import format as frame_format
from lmcache_core.plugins import registry
from lmcache_core.serde import BytesToBytes
from tests.backends.redis_servers import redis_server
from tests.servers import PATIENCE, free_port, running

SIZE, CHUNKS = 4, 4

Store = dict[str, Any]
Gather = Callable[[int, Tensors], None]
IsRight = Callable[[Chunk], bool]


class Turned(BytesToBytes):
    """Somebody's serde, which not every node has."""

    name = "turned"

    def encode(self, parts, context):
        return [memoryview(b"".join(parts)[::-1])]

    def decode(self, parts, context, allocate, limit):
        return self.encode(parts, context)


class Node:
    """An engine of a fleet: with a pipeline, perhaps a serde of its own, of a version."""

    def __init__(self, store: Store, serde: Any = (), *, version: int = 1, has: tuple = ()) -> None:
        self.version, self.has = version, has
        self.tier = {**store, "name": "store", "serde": serde}

    def uses(
        self, namespace: Namespace, gather: Gather, is_right: IsRight
    ) -> tuple[int, int, int, int]:
        """A prompt is looked up, loaded, its rest computed and stored, and the next one comes.
        Returns what each prompt found and loaded."""
        with pytest.MonkeyPatch.context() as patch:
            entries = registry._entries
            more = {n: [EntryPoint(n, f"{__name__}:Turned", "")] for n in self.has}
            patch.setattr(
                registry,
                "_entries",
                lambda group: {**entries(group), **(more if group == "serdes" else {})},
            )
            patch.setattr(frame_format, "FRAME_VERSION", self.version)
            with lmcache_core.open({"chunk_size": SIZE, "tiers": [self.tier]}) as cache:
                keys = namespace.keys(range(CHUNKS * SIZE), SIZE)
                first = cache.lookup(keys).chunks, _loaded(cache, keys, is_right)
                assert cache.lookup(keys).chunks == first[1]
                cache.store(namespace, keys, gather, start=first[1])
                cache.flush(20)
                stored = cache.stats().get(("stored", "store"), 0)
                assert stored == CHUNKS - first[1]
                return *first, cache.lookup(keys).chunks, _loaded(cache, keys, is_right)


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    with running(redis_server(tmp_path_factory.mktemp("redis"), port)):
        yield port


@pytest.fixture(params=["disk", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store that is empty, which a fleet shares."""
    if request.param == "disk":
        return {"backend": "disk", "path": str(tmp_path), "capacity": "1MiB"}
    port = request.getfixturevalue("redis_port")
    with redis.Redis(port=port) as client:
        client.flushall()
    return {"backend": "redis", "url": f"redis://127.0.0.1:{port}", "deadline": PATIENCE}


def _loaded(cache: CacheEngine, keys: list[ChunkKey], is_right: IsRight) -> int:
    chunks = [is_right(chunk) for chunk in cache.load(keys)]
    assert all(chunks)
    return len(chunks)


def sealed(*names: str) -> list[Any]:
    return ["zstd", {"encrypt": {"keys": [{"key_env": name} for name in names]}}]


READS, DOES_NOT = (CHUNKS, CHUNKS, CHUNKS, CHUNKS), (CHUNKS, 0, CHUNKS, CHUNKS)


@pytest.mark.parametrize(
    ("one", "two", "there", "back"),
    [
        ({"serde": ["zstd"]}, {"serde": ["byteplane"]}, READS, READS),
        ({"serde": sealed("OLD")}, {"serde": sealed("NEW", "OLD")}, READS, READS),
        ({"serde": sealed("OLD")}, {"serde": sealed("NEW")}, DOES_NOT, DOES_NOT),
        ({"serde": ["zstd"]}, {"serde": sealed("NEW")}, DOES_NOT, DOES_NOT),
        ({"version": 1}, {"version": 2}, DOES_NOT, DOES_NOT),
        ({"serde": ["turned"], "has": ("turned",)}, {}, DOES_NOT, READS),
    ],
    ids=["serde", "key added", "key replaced", "encrypt begun", "version", "serde removed"],
)
def test_a_fleet_of_two_over_one_store(
    namespace: Namespace,
    gather: Gather,
    is_right: IsRight,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    one: dict[str, Any],
    two: dict[str, Any],
    there: tuple[int, ...],
    back: tuple[int, ...],
) -> None:
    """Upgrade, and rollback: each node reads what it can and replaces what it cannot."""
    monkeypatch.setenv("OLD", "0a" * 32)
    monkeypatch.setenv("NEW", "0b" * 32)
    first, second = Node(store, **one), Node(store, **two)
    assert first.uses(namespace, gather, is_right)[2:] == (CHUNKS, CHUNKS)
    assert second.uses(namespace, gather, is_right) == there
    assert second.uses(namespace, gather, is_right) == READS
    assert first.uses(namespace, gather, is_right) == back
    assert first.uses(namespace, gather, is_right) == READS


def test_keys_rotate_over_one_store(
    namespace: Namespace,
    gather: Gather,
    is_right: IsRight,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The new key everywhere for reading, then for sealing; then what the old one sealed goes."""
    monkeypatch.setenv("OLD", "0a" * 32)
    monkeypatch.setenv("NEW", "0b" * 32)
    steps = [("OLD",), ("OLD", "NEW"), ("NEW", "OLD"), ("NEW",)]
    seen = [Node(store, sealed(*names)).uses(namespace, gather, is_right) for names in steps]
    assert seen == [(0, 0, CHUNKS, CHUNKS), READS, READS, DOES_NOT]


def test_unreadable_frames_are_remembered_for_a_while_and_not_without_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(unreadable.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(unreadable, "MAX_KEYS", 3)
    keys = [ChunkKey(bytes([n]) * 32) for n in range(5)]
    known = Unreadable()
    for key in keys:
        known.add([key])
    assert known.among(keys) == keys[2:]
    assert known.hide(keys, [True] * 5) == [True, True, False, False, False]
    known.discard(keys[:4])
    assert known.among(keys) == keys[4:]
    now[0] = unreadable.FORGET_SECONDS + 1
    assert known.among(keys) == []
