"""invalidate and clear: what is removed is gone from every tier, and nothing else is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lmcache_core
from lmcache_backends.disk import DiskBackend
from lmcache_core import CacheEngine, Namespace, Tensors
from lmcache_core.kv.namespace import tenant_digest
from tests.backends.redis_servers import redis_server
from tests.backends.test_memcached import memcached_server
from tests.s3_server import BUCKET, KEY_ID, SECRET, s3_server
from tests.servers import free_port, running

Gather = Callable[[int, Tensors], None]
TOKENS = 8
CHUNKS = 5


@pytest.fixture(params=["local_cpu", "disk", "shm", "redis", "memcached", "s3"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """One of each kind that can tell what it has."""
    port = free_port()
    match request.param:
        case "local_cpu":
            yield {"backend": "local_cpu", "capacity": "1MiB"}
        case "disk":
            yield {"backend": "disk", "path": str(tmp_path / "cache"), "capacity": "1MiB"}
        case "shm":
            pool = f"removal-{port}"
            yield {"backend": "shm", "pool": pool, "capacity": "1MiB"}
            for file in Path("/dev/shm").glob(f"lmcache-*-{pool}*"):
                file.unlink()
        case "redis":
            with running(redis_server(tmp_path, port)):
                yield {"backend": "redis", "url": f"redis://127.0.0.1:{port}"}
        case "memcached":
            with running(memcached_server(port)):
                yield {"backend": "memcached", "url": f"memcached://127.0.0.1:{port}"}
        case "s3":
            with s3_server(tmp_path) as server:
                url = f"s3://{KEY_ID}:{SECRET.replace('/', '%2F')}@{BUCKET}"
                yield {"backend": "s3", "url": url, "endpoint": server.endpoint}


@pytest.fixture
def cache(tier: dict[str, Any]) -> Iterator[CacheEngine]:
    patient = tier if tier["backend"] == "local_cpu" else {**tier, "deadline": 5.0}
    with lmcache_core.open({"chunk_size": TOKENS, "tiers": [patient]}) as cache:
        yield cache


def filled(cache: CacheEngine, namespace: Namespace, gather: Gather) -> list[lmcache_core.ChunkKey]:
    keys = cache.keys(namespace, range(CHUNKS * TOKENS))
    assert cache.store(namespace, keys, gather) == CHUNKS
    assert cache.flush(30.0)
    assert cache.lookup(keys).chunks == CHUNKS
    return keys


def test_what_is_invalidated_is_gone_and_counted(
    cache: CacheEngine, namespace: Namespace, gather: Gather
) -> None:
    keys = filled(cache, namespace, gather)
    name = cache.tiers[0].name
    removed = cache.invalidate(keys[2:4])
    assert removed.complete
    assert removed.chunks == {name: 2}
    assert cache.lookup(keys).chunks == 2
    assert cache.stats()["removed", name] == 2
    assert cache.invalidate(keys[2:4]).chunks == {name: 0}
    assert cache.store(namespace, keys, gather) == (2 if cache.tiers[0].in_memory else CHUNKS)
    assert cache.flush(30.0)
    assert cache.lookup(keys).chunks == CHUNKS


def test_clear_takes_a_model_a_tenant_a_namespace_and_leaves_the_others(
    cache: CacheEngine, namespace: Namespace, gather: Gather
) -> None:
    name = cache.tiers[0].name
    other = namespace.model_copy(update={"model": "org/other"})
    tenant = namespace.model_copy(update={"tenant": tenant_digest("alice")})
    keys = {
        "model": filled(cache, namespace, gather),
        "other": filled(cache, other, gather),
        "tenant": filled(cache, tenant, gather),
    }

    def there() -> dict[str, int]:
        return {which: cache.lookup(some).chunks for which, some in keys.items()}

    assert cache.clear(model="org/other").chunks == {name: CHUNKS}
    assert there() == {"model": CHUNKS, "other": 0, "tenant": CHUNKS}
    assert cache.clear(model=namespace.model, tenant="bob").chunks == {name: 0}
    assert cache.clear(tenant="alice").chunks == {name: CHUNKS}
    assert there() == {"model": CHUNKS, "other": 0, "tenant": 0}
    assert cache.clear(namespace=other).chunks == {name: 0}
    assert cache.clear().chunks == {name: CHUNKS}
    assert there() == {"model": 0, "other": 0, "tenant": 0}


def test_what_waits_to_be_written_is_removed_too(
    tmp_path: Path, namespace: Namespace, gather: Gather, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    put = DiskBackend.put

    def slow(*arguments: Any) -> int:
        begun.set()
        assert go_on.wait(30.0)
        return put(*arguments)

    monkeypatch.setattr(DiskBackend, "put", slow)
    disk = {"backend": "disk", "path": str(tmp_path), "capacity": "1MiB", "deadline": 20.0}
    with lmcache_core.open({"chunk_size": TOKENS, "tiers": [disk]}) as cache:
        first, second = (cache.keys(namespace, [n] * TOKENS * CHUNKS) for n in (1, 2))
        cache.store(namespace, first, gather)
        assert begun.wait(30.0)
        cache.store(namespace, second, gather)
        assert cache.invalidate(second).chunks == {"disk": CHUNKS}
        threading.Timer(0.1, go_on.set).start()
        assert cache.invalidate(first).chunks == {"disk": CHUNKS}  # waits until they are written
        assert cache.flush(30.0)
        assert cache.lookup(first).chunks == cache.lookup(second).chunks == 0


def test_a_tier_that_does_not_answer_is_named(
    tmp_path: Path, namespace: Namespace, gather: Gather
) -> None:
    port = free_port()
    with running(redis_server(tmp_path, port)) as server:
        memory = {"backend": "local_cpu", "capacity": "1MiB"}
        redis = {"backend": "redis", "url": f"redis://127.0.0.1:{port}", "deadline": 0.5}
        with lmcache_core.open({"chunk_size": TOKENS, "tiers": [memory, redis]}) as cache:
            keys = filled(cache, namespace, gather)
            server.freeze()
            removed = cache.invalidate(keys)
            assert removed.chunks == {"local_cpu": CHUNKS}
            assert not removed.complete
            assert "no answer within" in removed.failed["redis"]
            assert "no answer within" in cache.clear(timeout=0.5).failed["redis"]
            server.thaw()
