"""What an engine sees of a network store whose network fails: right chunks or misses, in time."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import lmcache_core
from lmcache_core import Chunk, ChunkKey, Namespace, Tensors
from lmcache_core.engine.engine import CacheEngine
from lmcache_core.io.transfer import SLOWEST
from tests.backends.redis_servers import redis_server
from tests.backends.test_memcached import memcached_server
from tests.core.conftest import gather, is_right, layout, namespace  # noqa: F401
from tests.s3_server import BUCKET, KEY_ID, SECRET, s3_server
from tests.servers import PATIENCE, Proxy, Server, eventually, free_port, running

CHUNKS = 12
TOKENS = 64
"""4 KiB of KV a chunk."""
LARGE = 256
"""Times as many for a MiB."""
DEADLINE = 0.25
CALM = 1.0
"""The same where many connections are made at once, on a busy machine."""
LOADS = 8
"""At a time, as vLLM's connector has them."""

Gather = Callable[[int, Tensors], None]
IsRight = Callable[[Chunk], bool]


class Store(NamedTuple):
    """A real server, a tier on it that goes through a proxy, and what the tier is without one."""

    server: Server
    proxy: Proxy
    tier: dict[str, Any]
    direct: dict[str, str]


@contextlib.contextmanager
def redis_store(folder: Path) -> Iterator[Store]:
    port = free_port()
    with running(redis_server(folder, port)) as server, Proxy(port) as proxy:
        tier = {"backend": "redis", "url": f"redis://127.0.0.1:{proxy.port}"}
        yield Store(server, proxy, tier, {"url": f"redis://127.0.0.1:{port}"})


@contextlib.contextmanager
def memcached_store(folder: Path) -> Iterator[Store]:
    port = free_port()
    with running(memcached_server(port)) as server, Proxy(port) as proxy:
        tier = {"backend": "memcached", "url": f"memcached://127.0.0.1:{proxy.port}"}
        yield Store(server, proxy, tier, {"url": f"memcached://127.0.0.1:{port}"})


@contextlib.contextmanager
def s3_store(folder: Path) -> Iterator[Store]:
    with s3_server(folder) as server, Proxy(server.port) as proxy:
        url = f"s3://{KEY_ID}:{SECRET.replace('/', '%2F')}@{BUCKET}"
        tier = {"backend": "s3", "url": url, "endpoint": f"http://127.0.0.1:{proxy.port}"}
        yield Store(server, proxy, tier, {"endpoint": server.endpoint})


@pytest.fixture(params=[redis_store, memcached_store, s3_store], ids=["redis", "memcached", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with request.param(tmp_path) as store:
        yield store


@pytest.fixture
def cache(store: Store) -> Iterator[CacheEngine]:
    config = {"chunk_size": TOKENS, "tiers": [{**store.tier, "deadline": DEADLINE}]}
    with lmcache_core.open(config) as cache:
        yield cache


@pytest.fixture
def keys(store: Store, namespace: Namespace, gather: Gather) -> Sequence[ChunkKey]:  # noqa: F811
    """Of a sequence that is stored, by an engine that waits as long as it takes."""
    keys = namespace.keys(range(CHUNKS * TOKENS), TOKENS)
    tier = {**store.tier, **store.direct, "deadline": PATIENCE}
    with lmcache_core.open({"chunk_size": TOKENS, "tiers": [tier]}) as cache:
        assert cache.store(namespace, keys, gather) == CHUNKS
        assert cache.flush(PATIENCE)
    return keys


def loaded(cache: CacheEngine, keys: Sequence[ChunkKey], is_right: IsRight) -> int:  # noqa: F811
    """How many chunks a load brings, each of them checked."""
    count = 0
    for chunk in cache.load(keys):
        assert (chunk.index, chunk.key) == (count, keys[count])
        assert is_right(chunk)
        count += 1
    return count


def comes_back(cache: CacheEngine, keys: Sequence[ChunkKey], is_right: IsRight) -> None:  # noqa: F811
    """Everything is served again, with nobody's help."""
    end = time.monotonic() + PATIENCE
    while loaded(cache, keys, is_right) < len(keys):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("fault", ["cut", "garble", "stall", "slow"])
def test_faults_at_any_byte_of_the_network(
    store: Store,
    cache: CacheEngine,
    keys: Sequence[ChunkKey],
    namespace: Namespace,  # noqa: F811
    gather: Gather,  # noqa: F811
    is_right: IsRight,  # noqa: F811
    fault: str,
) -> None:
    chance = random.Random(1)
    for _ in range(6 if fault in ("stall", "slow") else 40):
        offset = chance.randrange(CHUNKS * 4500 // 2)
        match fault:
            case "cut":
                store.proxy.cut_after = offset
            case "stall":
                store.proxy.stall_after = offset
            case "garble":
                garbage = chance.randbytes(chance.choice((1, 3, 40)))
                store.proxy.garble_at = (offset, garbage)
            case "slow":
                store.proxy.rate = 30_000.0
        began = time.monotonic()
        loaded(cache, keys, is_right)
        assert time.monotonic() - began < 4 * DEADLINE + 1.0
        store.proxy.heal()
        if fault == "garble":  # what looked damaged was removed
            store_again(cache, namespace, keys, gather)
        else:
            comes_back(cache, keys, is_right)


def store_again(
    cache: CacheEngine,
    namespace: Namespace,  # noqa: F811
    keys: Sequence[ChunkKey],
    gather: Gather,  # noqa: F811
) -> None:
    end = time.monotonic() + PATIENCE
    while cache.lookup(keys).chunks < len(keys):
        assert time.monotonic() < end
        cache.store(namespace, keys, gather)
        assert cache.flush(PATIENCE)
        time.sleep(0.01)


def test_a_dead_store_costs_one_deadline_and_comes_back_by_itself(
    store: Store,
    cache: CacheEngine,
    keys: Sequence[ChunkKey],
    is_right: IsRight,  # noqa: F811
) -> None:
    store.server.freeze()
    began = time.monotonic()
    assert loaded(cache, keys, is_right) == 0
    assert time.monotonic() - began < CHUNKS // 2 * DEADLINE  # not one for each chunk
    began = time.monotonic()
    for _ in range(100):
        assert loaded(cache, keys, is_right) == 0
    assert time.monotonic() - began < 20 * DEADLINE  # it is bypassed
    store.server.thaw()
    comes_back(cache, keys, is_right)


@pytest.fixture
def large_keys(store: Store, namespace: Namespace, gather: Gather) -> Sequence[ChunkKey]:  # noqa: F811
    """As `keys`, of chunks of a MiB."""
    tokens = LARGE * TOKENS
    keys = namespace.keys(range(8 * tokens), tokens)
    tier = {**store.tier, **store.direct, "deadline": PATIENCE}
    with lmcache_core.open({"chunk_size": tokens, "tiers": [tier]}) as cache:
        assert cache.store(namespace, keys, gather) == len(keys)
        assert cache.flush(PATIENCE)
    return keys


def test_loads_that_share_a_line_share_the_patience(
    store: Store,
    large_keys: Sequence[ChunkKey],
    is_right: IsRight,  # noqa: F811
) -> None:
    """Together they get twice what counts as stuck, each a quarter of it."""
    tier = {**store.tier, "deadline": CALM}
    connections = 8 if store.tier["backend"] == "s3" else 2  # of a load
    with lmcache_core.open({"chunk_size": LARGE * TOKENS, "tiers": [tier]}) as cache:
        store.proxy.rate = 2 * SLOWEST / (LOADS * connections)
        with ThreadPoolExecutor(LOADS) as threads:
            loads = [threads.submit(loaded, cache, large_keys, is_right) for _ in range(LOADS)]
            assert [load.result() for load in loads] == [len(large_keys)] * LOADS
        assert not cache.bypassed(0)


def test_a_connection_that_hangs_among_others_that_flow_is_found_out(
    store: Store,
    large_keys: Sequence[ChunkKey],
    is_right: IsRight,  # noqa: F811
) -> None:
    """As one that a firewall forgot: it costs its own load the deadline, however long others go
    on."""
    tier = {**store.tier, "deadline": CALM}
    with lmcache_core.open({"chunk_size": LARGE * TOKENS, "tiers": [tier]}) as cache:
        store.proxy.rate = 2 * SLOWEST
        stop = threading.Event()

        def go_on() -> None:
            while not stop.is_set():
                loaded(cache, large_keys, is_right)

        given_up = ("bypassed", "reads", cache.tiers[0].name)
        with ThreadPoolExecutor(4) as threads, contextlib.ExitStack() as stack:
            others = [threads.submit(go_on) for _ in range(4)]
            stack.callback(stop.set)
            eventually(lambda: cache.stats().get(("loaded", cache.tiers[0].name), 0) > 20)
            assert given_up not in cache.stats()
            store.proxy.mute = 1
            began = time.monotonic()
            eventually(lambda: given_up in cache.stats())
            assert time.monotonic() - began < 4 * CALM
            stop.set()
            for other in others:
                other.result()
        comes_back(cache, large_keys, is_right)


def test_a_server_that_is_killed_and_started_anew_is_filled_again(
    store: Store,
    cache: CacheEngine,
    keys: Sequence[ChunkKey],
    namespace: Namespace,  # noqa: F811
    gather: Gather,  # noqa: F811
    is_right: IsRight,  # noqa: F811
) -> None:
    store.server.kill()
    assert loaded(cache, keys, is_right) == 0
    store.server.start()
    store_again(cache, namespace, keys, gather)
    comes_back(cache, keys, is_right)
