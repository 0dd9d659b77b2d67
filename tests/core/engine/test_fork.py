"""Forks: a server that opens a cache, uses it and then forks its workers (gunicorn --preload, uWSGI,
multiprocessing), at whatever moment. The workers cache, or compute and say so; the server goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lmcache_core
from lmcache_core import CacheEngine, Chunk, ConfigError, Namespace, Tensors
from lmcache_core.engine.tier import Tier
from lmcache_core.io import process
from lmcache_core.plugins.log import LOG

SIZE, CHUNKS = 4, 4

Gather = Callable[[int, Tensors], None]
IsRight = Callable[[Chunk], bool]


def worker(work: Callable[[], object], *, ends: Callable[[int], object] = os._exit) -> str:
    """What `work` returns or logs in a forked child, as text; the child ends by `ends`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)  # a worker that hangs is killed, and seen
            os.write(writing, _what_comes_of(work).encode())
        ends(0)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, text
    return text


def _what_comes_of(work: Callable[[], object]) -> str:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("lmcache_core").addHandler(handler)
    try:
        result = work()
    except BaseException:
        return traceback.format_exc()
    return "\n".join([str(result), *lines])


class Server:
    """An engine that is used before the fork."""

    def __init__(self, cache: CacheEngine, namespace: Namespace, gather: Gather, right: IsRight):
        self.cache, self.namespace, self.gather, self.right = cache, namespace, gather, right

    def keys(self, first: int) -> list[lmcache_core.ChunkKey]:
        return self.namespace.keys([first, *range(1, SIZE * CHUNKS)], SIZE)

    def store(self, first: int) -> int:
        stored = self.cache.store(self.namespace, self.keys(first), self.gather)
        self.cache.flush(20)
        return stored

    def load(self, first: int) -> int:
        chunks = list(self.cache.load(self.keys(first)))
        assert all(map(self.right, chunks))
        return len(chunks)

    def serve(self) -> tuple[int, int, int, int]:
        """A request of before the fork, then a new one: (found, loaded, loaded anew, loaded)."""
        new = 1000 + os.getpid()
        found = self.cache.lookup(self.keys(1)).chunks
        old, nothing = self.load(1), self.load(new)
        assert nothing == 0
        self.store(1)
        self.store(new)
        return found, old, self.load(1), self.load(new)


@pytest.fixture
def pool() -> Iterator[str]:
    name = f"fork-{os.getpid()}-{secrets.token_hex(4)}"
    yield name
    Path(f"/dev/shm/lmcache-{os.getuid()}-{name}").unlink(missing_ok=True)


@pytest.fixture
def serving(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path, pool: str
) -> Callable[..., Server]:
    more = {
        "disk": {"path": str(tmp_path / "kv"), "capacity": "4MiB"},
        "shm": {"pool": pool, "capacity": "4MiB"},
        "local_cpu": {"capacity": "4MiB"},
    }

    def open_server(*names: str, **options: Any) -> Server:
        tiers = [{"backend": name, **more[name]} for name in names]
        cache = lmcache_core.open({"chunk_size": SIZE, "tiers": tiers, **options})
        server = Server(cache, namespace, gather, is_right)
        server.store(1)
        assert server.load(1) == CHUNKS
        return server

    return open_server


@pytest.mark.parametrize("names", ["disk", "shm", "shm disk", "local_cpu disk", "local_cpu"])
@pytest.mark.parametrize("ends", [os._exit, sys.exit], ids=["_exit", "exit"])
def test_a_worker_opens_the_tiers_that_the_server_had(
    serving: Callable[..., Server], names: str, ends: Callable[[int], object]
) -> None:
    server = serving(*names.split())
    with server.cache:
        text = [worker(server.serve, ends=_in_pytest(ends)) for _ in range(2)]
        shared = CHUNKS if names != "local_cpu" else 0
        assert all(each.startswith(f"({shared}, {shared}, {CHUNKS}, {CHUNKS})") for each in text)
        private = "in a forked child local_cpu begins empty, beside its parent's" in text[0]
        assert private == ("local_cpu" in names)
        assert server.load(1) == CHUNKS  # the server has lost nothing by it
        assert server.store(2) == CHUNKS
        assert not any(server.cache.bypassed(n) for n in range(len(names.split())))


def _in_pytest(ends: Callable[[int], object]) -> Callable[[int], object]:
    """As a program of its own would end: what `atexit` calls is called, pytest is not."""
    if ends is os._exit:
        return ends

    def end(status: int) -> None:
        import atexit

        threading._shutdown()
        atexit._run_exitfuncs()
        os._exit(status)

    return end


def test_a_worker_that_cannot_open_them_computes_and_says_so_once(
    serving: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serving("local_cpu", "disk")
    with server.cache:
        hit = server.cache.lookup(server.keys(1))

        def serve() -> object:
            def fails(*_: object, **__: object) -> None:
                raise ConfigError("no room for it")

            monkeypatch.setattr(Tier, "__init__", fails)
            cache = server.cache
            loaded = len(list(cache.load(hit)))
            return loaded, server.store(1), server.load(1), cache.bypassed(0), cache.tiers

        text = worker(serve)
    assert text == "(0, 0, 0, True, ())\nin a forked child nothing is cached: no room for it"


def test_a_worker_of_a_closed_engine_finds_nothing(serving: Callable[..., Server]) -> None:
    server = serving("disk")
    server.cache.close()
    assert worker(lambda: (server.load(1), server.store(1))) == "(0, 0)"


def test_a_worker_that_closes_an_engine_closes_its_own(serving: Callable[..., Server]) -> None:
    server = serving("shm", "disk")
    with server.cache:

        def close_and_serve(first: bool) -> tuple[int, int]:
            if not first:
                server.load(1)
            server.cache.close()
            return server.load(1), server.store(3)

        assert worker(lambda: close_and_serve(True)) == "(0, 0)"
        assert worker(lambda: close_and_serve(False)) == "(0, 0)"
        assert server.load(1) == CHUNKS


def test_a_load_that_is_under_way_ends_in_the_worker_and_goes_on_in_the_server(
    serving: Callable[..., Server],
) -> None:
    server = serving("disk")
    with server.cache:
        load = server.cache.load(server.keys(1))
        assert server.right(next(load))
        assert worker(lambda: (len(list(load)), server.load(1))) == f"(0, {CHUNKS})"
        assert worker(load.close) == "None"
        assert len(list(load)) == CHUNKS - 1


def test_whatever_the_server_is_doing_a_worker_is_forked_from(
    serving: Callable[..., Server],
) -> None:
    """Its threads hold any lock, and are in the middle of any call."""
    server, over = serving("local_cpu", "shm", "disk"), threading.Event()

    def use(seed: int) -> None:
        while not over.is_set():
            server.store(seed)
            server.load(seed)
            server.cache.stats()
            LOG.warn("fork", "a line")

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(2, 6)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            text = worker(server.serve)
            assert f"{CHUNKS}, {CHUNKS})" in text, text
    finally:
        over.set()
        for thread in threads:
            thread.join()
        server.cache.close()


def test_what_is_everybodys_begins_anew_in_a_child() -> None:
    class Thing:
        told = 0

        def in_child(self) -> None:
            self.told += 1

    thing, lock = Thing(), process.freed_in_children(threading.Lock())
    process.tell_children(thing)
    with lock:
        assert worker(lambda: (thing.told, lock.acquire(timeout=5))) == "(1, True)"
    assert thing.told == 0
