"""Third parties' backends that do in each method whatever can be done wrong: return something else,
raise anything. The engine gets nothing, counts it, and its author sees class, file and line."""

from __future__ import annotations

import inspect
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import numpy as np
import pytest

import lmcache_core
from lmcache_core import CacheEngine, ChunkKey, ConfigError, Namespace
from lmcache_core.backend import StorageBackend, Stored
from lmcache_core.plugins import registry
from lmcache_core.plugins.log import LOG

SIZE, CHUNKS = 4, 3


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Panic(BaseException):
    """As what Rust raises."""


class Truthless:
    def __bool__(self) -> bool:
        raise SystemExit(3)


class Theirs(StorageBackend):
    """A dictionary, until a method is told to do something else."""

    wrong: ClassVar[dict[str, Callable[[Any], Any]]] = {}
    kept: ClassVar[dict[ChunkKey, bytes]] = {}

    def _do(self, method: str, right: Any) -> Any:
        return self.wrong[method](right) if method in self.wrong else right

    def __init__(self, options: Any) -> None:
        self._do("open", None)

    def contains(self, keys, transfer):
        return self._do("contains", [key in self.kept for key in keys])

    def get(self, keys, transfer):
        there = [
            (i, [memoryview(self.kept[key])]) for i, key in enumerate(keys) if key in self.kept
        ]
        return self._do("get", iter(there))

    def put(self, frames, prefix, transfer):
        for key, parts in frames:
            self.kept[key] = b"".join(parts)
        return self._do("put", len(frames))

    def delete(self, keys, transfer):
        for key in keys:
            self.kept.pop(key, None)
        self._do("delete", None)

    def touch(self, keys, transfer):
        self._do("touch", None)

    def scan(self, transfer):
        return self._do("scan", iter([Stored(key, len(data)) for key, data in self.kept.items()]))

    def ping(self, transfer):
        self._do("ping", None)

    def close(self):
        self._do("close", None)


class InMemory(Theirs):
    in_memory = True

    def reserve(self, nbytes, prefix, transfer):
        return self._do("reserve", memoryview(bytearray(nbytes)))


class MakesADict(Theirs):
    def __new__(cls, options):
        return {}


def raising(error: BaseException) -> Callable[[Any], Any]:
    def wrong(right: Any) -> Any:
        raise error

    return wrong


def midway(error: BaseException) -> Callable[[Any], Iterator[Any]]:
    def wrong(right: Iterator[Any]) -> Iterator[Any]:
        yield next(right)
        raise error

    return wrong


def giving(value: Any) -> Callable[[Any], Any]:
    return lambda right: value


def each(change: Callable[[Any], Any]) -> Callable[[Any], Iterator[Any]]:
    return lambda right: map(change, right)


ERRORS = {
    error.__name__: error
    for error in (ValueError, Mute, Panic, SystemExit, GeneratorExit, MemoryError, StopIteration)
}
RETURNED: dict[str, dict[str, Callable[[Any], Any]]] = {
    "contains": {
        "nothing": giving(None),
        "a number": giving(3),
        "a text": giving("yes"),
        "too few": lambda right: right[1:],
        "too many": lambda right: [*right, True],
        "arrays": lambda right: [np.array([1, 2])] * len(right),
        "what has no truth": lambda right: [Truthless() for _ in right],
    },
    "get": {
        "nothing": giving(None),
        "frames alone": each(lambda got: got[1]),
        "bytes": each(lambda got: (got[0], bytes(got[1][0]))),
        "a list of bytes": each(lambda got: (got[0], [bytes(got[1][0])])),
        "floats": each(lambda got: (got[0], [memoryview(np.zeros(99))])),
        "an index beyond": each(lambda got: (got[0] + 99, got[1])),
        "an index before": each(lambda got: (got[0] - 99, got[1])),
        "a key": each(lambda got: (b"key", got[1])),
    },
    "put": {"nothing": giving(None), "too many": giving(99), "less than none": giving(-1), "a text": giving("3")},
    "reserve": {
        "bytes": giving(b"12"),
        "a bytearray": lambda right: bytearray(right),
        "more": lambda right: memoryview(bytearray(right.nbytes + 8)),
        "less": lambda right: right[:-8],
        "what cannot be written": lambda right: right.toreadonly(),
        "every other byte": lambda right: memoryview(bytearray(2 * right.nbytes))[::2],
        "doubles": lambda right: right.cast("d"),
    },
    "scan": {
        "nothing": giving(None),
        "keys": each(lambda one: one.key),
        "texts": each(lambda one: Stored("key", 3)),
    },
}  # fmt: skip
RAISED = {
    f"{method} raises {name}{when}": (method, how(error()))
    for method in ("contains", "get", "put", "reserve", "scan", "touch", "delete", "close")
    for name, error in ERRORS.items()
    for how, when in ((raising, ""), (midway, " midway"))
    if how is raising or method in ("get", "scan")
}
GIVEN = {
    f"{method} gives {name}": (method, wrong)
    for method, all_wrong in RETURNED.items()
    for name, wrong in all_wrong.items()
}
CASES = [
    pytest.param(backend, *case, id=f"{backend}: {name}")
    for name, case in {**GIVEN, **RAISED}.items()
    for backend in ("theirs", "in-memory")
    if case[0] != "reserve" or backend == "in-memory"
]


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    LOG._seen.clear()
    monkeypatch.setattr(Theirs, "wrong", {})
    monkeypatch.setattr(Theirs, "kept", {})
    entries = registry._entries
    names = {"theirs": "Theirs", "in-memory": "InMemory", "dict": "MakesADict"}
    more = {n: [EntryPoint(n, f"{__name__}:{c}", "")] for n, c in names.items()}
    monkeypatch.setattr(
        registry, "_entries", lambda group: {**entries(group), **(more if group == "backends" else {})}
    )  # fmt: skip


def use(cache: CacheEngine, namespace: Namespace, gather: Any, first: int = 0) -> list[int]:
    """Every call of an engine's. Returns how many chunks each load brought, all of them right."""
    keys = namespace.keys([first, *range(1, SIZE * CHUNKS)], SIZE)
    loads = []
    for _ in range(2):
        cache.store(namespace, keys, gather)
        assert cache.flush(10)
        assert cache.lookup(keys).chunks <= CHUNKS
        loads.append(sum(1 for _ in cache.load(keys)))
        cache.locate(keys)
    cache.invalidate(keys)
    cache.clear(namespace=namespace)
    return loads


@pytest.mark.parametrize(("backend", "method", "wrong"), CASES)
def test_whatever_a_backend_does_wrong_is_counted_and_nobody_elses(
    namespace: Namespace,
    gather: Any,
    caplog: pytest.LogCaptureFixture,
    backend: str,
    method: str,
    wrong: Callable[[Any], Any],
) -> None:
    caplog.set_level(logging.DEBUG, "lmcache_core")
    cache = lmcache_core.open({"chunk_size": SIZE, "tiers": [{"backend": backend}]})
    with cache:
        assert use(cache, namespace, gather) == [CHUNKS, CHUNKS]
        Theirs.wrong = {method: wrong}
        use(cache, namespace, gather, first=1)
        keys = namespace.keys([2, *range(1, SIZE * CHUNKS)], SIZE)
        cache.store(namespace, keys, gather)
        cache.flush(10)
        removals = [cache.clear(namespace=namespace), cache.invalidate(keys)]
    failed = sum(n for labels, n in cache.stats().items() if labels[0] == "failed")
    told = any(removal.failed for removal in removals)
    assert failed or told
    culprits = [line for line in caplog.messages if f"{__name__}." in line and __file__ in line]
    assert culprits or told
    if method in ("contains", "get", "put", "reserve"):
        assert failed
        assert culprits


@pytest.mark.parametrize("error", [*ERRORS.values(), KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("method", ["open", "ping"])
def test_a_backend_that_cannot_be_opened(method: str, error: Any, caplog: Any) -> None:
    Theirs.wrong = {method: raising(error())}
    config = {"chunk_size": SIZE, "tiers": [{"backend": "theirs", "deadline": 0.5}]}
    if method == "open":
        with pytest.raises(ConfigError, match=r"^tiers\[0\]: "):
            lmcache_core.open(config)
        return
    with lmcache_core.open(config) as cache:
        assert cache.bypassed(0)
        assert "down at start" in caplog.text


def test_a_class_that_makes_something_else_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"tiers\[0\]: its class gives a dict, not a StorageB"):
        lmcache_core.open({"tiers": [{"backend": "dict"}]})


def test_what_a_method_gave_wrong_is_told_with_its_line(
    namespace: Namespace, gather: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "lmcache_core")
    Theirs.wrong = {"contains": giving("yes")}
    with lmcache_core.open({"chunk_size": SIZE, "tiers": [{"backend": "theirs"}]}) as cache:
        cache.lookup(namespace.keys(range(SIZE), SIZE))
    line = inspect.getsourcelines(Theirs.contains)[1]
    assert f"{__name__}.Theirs ({__file__}:{line})" in caplog.text
    assert "lookup failed: contains gives 'yes', not a list of bools" in caplog.text


@pytest.mark.parametrize("backend", ["theirs", "in-memory"])
def test_a_signals_handler_is_not_taken_for_a_backend(
    namespace: Namespace, gather: Any, backend: str
) -> None:
    """A server's handler of SIGTERM raises SystemExit in the middle of whatever it does."""

    def leave(*_: object) -> None:
        raise SystemExit(7)

    def terminated(right: Sequence[bool]) -> Sequence[bool]:
        if backend == "in-memory":
            os.kill(os.getpid(), signal.SIGUSR1)
        return right

    before = signal.signal(signal.SIGUSR1, leave)
    try:
        with lmcache_core.open({"chunk_size": SIZE, "tiers": [{"backend": backend}]}) as cache:
            keys = namespace.keys(range(SIZE), SIZE)
            cache.store(namespace, keys, gather)
            Theirs.wrong = {"contains": terminated}
            if backend == "theirs":
                assert cache.lookup(keys).chunks == 1
                return
            with pytest.raises(SystemExit):
                cache.lookup(keys)
    finally:
        signal.signal(signal.SIGUSR1, before)
