"""redis: the conformance suite, and what servers and networks do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis as stock

from lmcache_backends.redis import RedisBackend, RedisOptions
from lmcache_core import ChunkKey, StorageBackend
from lmcache_core.testing import BackendConformance
from tests.servers import Server, answers, free_port, program, running


def redis_server(folder: Path, port: int, *options: str) -> Server:
    """A server on `port` that keeps nothing on disk."""
    command = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--dir", str(folder), "--save", "", "--appendonly", "no", *options]
    return Server(command, answers(port, b"PING\r\n", b"+PONG"), folder / f"redis-{port}.log")


class RawRedis:
    """A bare client."""

    def __init__(self, client: stock.Redis, prefix: str = "lmcache") -> None:
        self._client, self._prefix = client, prefix

    def read(self, key: ChunkKey) -> bytes | None:
        return self._client.get(f"{self._prefix}:{key}")

    def write(self, key: ChunkKey, value: bytes) -> None:
        self._client.set(f"{self._prefix}:{key}", value)

    def keys(self) -> set[ChunkKey]:
        return {
            ChunkKey.parse(name.decode().split(":")[1])
            for name in self._client.scan_iter(f"{self._prefix}:*", 1000)
        }


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    with running(redis_server(tmp_path_factory.mktemp("redis"), port)):
        yield port


@pytest.fixture
def client(port: int) -> Iterator[stock.Redis]:
    with stock.Redis(port=port, protocol=2) as client:
        client.flushall()
        yield client


def opener(url: str, **options: object) -> Callable[[], RedisBackend]:
    return functools.partial(RedisBackend, RedisOptions(url=url, **options))


class TestRedis(BackendConformance):
    persistent = shared = True

    @pytest.fixture
    def raw(self, client: stock.Redis) -> RawRedis:
        return RawRedis(client)

    @pytest.fixture
    def open_backend(self, port: int, client: stock.Redis) -> Callable[[], StorageBackend]:
        return opener(f"redis://127.0.0.1:{port}")
