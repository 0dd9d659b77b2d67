"""Plugins hear what happens, each by itself; one that fails is named, counted and felt by nobody."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from prometheus_client import REGISTRY

import lmcache_core
from lmcache_core import CacheEngine, ConfigError, Namespace, hookimpl, unverified
from lmcache_core.plugins import listener
from lmcache_core.plugins.events import Event, Loaded, LookedUp, PluginFailed, Stored
from lmcache_core.plugins.log import LOG, RateLimitedLog

E = TypeVar("E", bound=Event)
MEMORY = {"backend": "local_cpu", "capacity": "1MiB"}


def opened(*plugins: object) -> CacheEngine:
    LOG._seen.clear()
    config = lmcache_core.Config(chunk_size=4, tiers=[MEMORY])
    return lmcache_core.open(config, plugins=plugins)


class Ear:
    def __init__(self) -> None:
        self.heard: list[Event] = []

    @hookimpl
    def lmcache_event(self, event: Event) -> None:
        self.heard.append(event)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.heard if isinstance(event, kind)]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def raising(error: BaseException) -> Any:
    class Broken:
        @hookimpl
        def lmcache_event(self) -> None:
            raise error

    return Broken()


def used(
    cache: CacheEngine, namespace: Namespace, gather: Any, first: int = 0
) -> dict[tuple[str, ...], float]:
    """What is counted of two chunks that are stored and loaded."""
    keys = namespace.keys(range(first, first + 8), 4)
    assert cache.store(namespace, keys, gather) == 2
    assert len(list(cache.load(keys))) == 2
    return cache.stats()


def test_plugins_hear_values(namespace: Namespace, gather: Any) -> None:
    ear = Ear()
    with opened(ear) as cache:
        used(cache, namespace, gather)
    (stored,) = ear.of(Stored)
    assert stored.tier == "local_cpu"
    assert stored.keys == tuple(namespace.keys(range(8), 4))
    assert stored.namespace == namespace.digest
    assert stored.nbytes == 8 * namespace.layout.bytes_per_token
    assert 0 < stored.seconds < 10
    (loaded,) = ear.of(Loaded)
    assert loaded.keys == stored.keys
    assert 0 < loaded.seconds < 10
    assert ear.of(LookedUp)[-1].found == 2


def test_prometheus_counts_what_the_engine_does(namespace: Namespace, gather: Any) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"lmcache_{name}", labels) or 0.0

    def values() -> list[float]:
        seconds = (f"tier_{job}_seconds_count" for job in ("lookup", "load", "store"))
        return [
            value("stored_chunks_total", tier="local_cpu"),
            value("missed_chunks_total", tier="", reason="absent"),
            *(value(name, tier="local_cpu") for name in seconds),
        ]

    before = values()
    with opened() as cache:
        cache.lookup(namespace.keys(range(100, 108), 4))
        used(cache, namespace, gather)
    # Asked: once before, once when storing, once when loading.
    assert [now - then for now, then in zip(values(), before, strict=True)] == [2, 2, 3, 1, 1]


# A plugin that fails.


@pytest.mark.parametrize("error", [RuntimeError("trouble"), SystemExit(3), KeyboardInterrupt()])
@pytest.mark.parametrize("first", [True, False])
def test_a_plugin_that_raises_is_counted_and_blinds_no_other(
    error: BaseException, first: bool, namespace: Namespace, gather: Any
) -> None:
    ear, whole = Ear(), opened()
    with whole:
        counted = used(whole, namespace, gather)
    broken = raising(error)
    with opened(*((broken, ear) if first else (ear, broken))) as cache:
        stats = used(cache, namespace, gather)
        wait_until(lambda: len(ear.of(PluginFailed)) >= 3)
    named = f"{type(broken).__module__}.{type(broken).__qualname__}"
    assert {k for k in stats if "seconds" not in k[0] and k[0] != "plugin_failed"} == {
        k for k in counted if "seconds" not in k[0]
    }
    assert len(ear.of(Stored)) == len(ear.of(Loaded)) == 1
    told = ear.of(PluginFailed)
    assert cache.stats()["plugin_failed", named] >= len(told)
    assert {event.plugin for event in told} == {named}


def test_a_plugin_that_raises_is_logged_once(
    namespace: Namespace, gather: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(raising(RuntimeError("redis://u:SECRET@h is down"))) as cache:
        used(cache, namespace, gather)
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "raising.<locals>.Broken: failed in lmcache_event: redis://***@h is down" in line


def test_a_plugins_author_sees_the_line_that_raised(
    namespace: Namespace, gather: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "lmcache_core"), opened(raising(OSError())) as cache:
        used(cache, namespace, gather)
    assert "test_observers.py:" in caplog.text


def test_a_plugin_that_hangs_holds_nobody_up(
    namespace: Namespace, gather: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hangs(Ear):
        free = threading.Event()

        @hookimpl
        def lmcache_event(self, event: Event) -> None:
            self.free.wait(60)

    monkeypatch.setattr(listener, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(listener, "LIMIT", 20)
    ear = Ear()
    with opened(Hangs(), ear) as cache:
        for number in range(10):
            used(cache, namespace, gather, number)
            wait_until(lambda: len(ear.of(Loaded)) == number + 1)  # noqa: B023 - at once
    assert any(name[0] == "plugin_failed" and "Hangs" in name[1] for name in cache.stats())
    Hangs.free.set()


def test_an_event_may_be_told_in_the_middle_of_telling(namespace: Namespace, gather: Any) -> None:
    """A load that nobody finishes is told of when it is collected, at any allocation."""

    class Cycle:
        def __init__(self, load: Any) -> None:
            self.load, self.me = load, self

    ear = Ear()
    with opened(ear) as cache:
        keys = namespace.keys(range(8), 4)
        cache.store(namespace, keys, gather)
        gc.disable()
        for _ in range(200):
            load = cache.load(keys)
            next(load)
            Cycle(load)
        del load
        before = gc.get_threshold()
        gc.set_threshold(1)
        gc.enable()
        try:
            for _ in range(50):
                cache.lookup(keys)
                cache.stats()
        finally:
            gc.set_threshold(*before)
        gc.collect()
        assert cache.stats()["loaded", "local_cpu"] == 200
    assert len(ear.of(Loaded)) == 200


def test_counts_are_complete_whatever_the_number_of_threads(
    namespace: Namespace, gather: Any
) -> None:
    with opened() as cache:
        keys = namespace.keys(range(8), 4)
        cache.store(namespace, keys, gather)
        threads = [
            threading.Thread(target=lambda: [list(cache.load(keys)) for _ in range(100)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cache.stats()["loaded", "local_cpu"] == 800


def test_a_dropped_engine_lets_its_listeners_go() -> None:
    cache = opened(Ear())
    gone = weakref.ref(cache._observers)
    del cache
    gc.collect()
    assert gone() is None  # and the fixture finds no thread


# What a plugin adds to the namespace.


class Cluster:
    @hookimpl
    def lmcache_namespace(self, fields: dict[str, object]) -> dict[str, str]:
        return {"cluster": f"of {fields['model']}"}


def test_a_plugin_adds_to_the_namespace(namespace: Namespace) -> None:
    with opened(Cluster()) as cache:
        ns = cache.namespace(
            model="m", layout=namespace.layout, extra={"a": "b"}, weights=unverified("test")
        )
    assert ns.extra == {"a": "b", "cluster": "of m"}


@pytest.mark.parametrize(
    "result",
    [5, None, {"a": 1}, {1: "a"}, [("a", "b")], {"cluster": "of others"}, OSError("down"), SystemExit(1)],
)  # fmt: skip
def test_a_plugin_that_fails_makes_no_smaller_namespace(result: Any, namespace: Namespace) -> None:
    class Flaky:
        @hookimpl
        def lmcache_namespace(self) -> Any:
            if isinstance(result, BaseException):
                raise result
            return result

    failed = pytest.raises(ConfigError, match=r"Flaky: failed in lmcache_namespace: \S+")
    with opened(Cluster(), Flaky()) as cache, failed:
        cache.namespace(model="m", layout=namespace.layout, weights=unverified("test"))


# A plugin that is written wrongly.


def test_a_misspelt_argument_is_a_config_error() -> None:
    class Misspelt:
        @hookimpl
        def lmcache_event(self, evnet: object) -> None: ...

    with pytest.raises(ConfigError, match=r"plugin .*Misspelt cannot be used: .*evnet"):
        opened(Misspelt())


def test_a_misspelt_hook_is_a_config_error_and_one_of_another_version_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Misspelt:
        @hookimpl
        def lmcache_namspace(self) -> None: ...

    class Newer:
        @hookimpl
        def lmcache_commands(self) -> None: ...

    with pytest.raises(ConfigError, match=r"Misspelt .*did you mean lmcache_namespace"):
        opened(Misspelt())
    opened(Newer()).close()
    assert "Newer: unknown hook lmcache_commands" in caplog.text


def test_a_wrapper_is_a_config_error() -> None:
    class Wraps:
        @hookimpl(wrapper=True)
        def lmcache_namespace(self) -> Any:
            return (yield)

    with pytest.raises(ConfigError, match="wraps others"):
        opened(Wraps())


# The log.


def test_one_line_of_a_kind_and_a_count_of_the_rest(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("lmcache_core.plugins.log.time.monotonic", lambda: clock[0])
    log = RateLimitedLog()
    with caplog.at_level(logging.WARNING, "lmcache_core"):
        for _ in range(10):
            log.warn("a", "trouble a")
        log.warn("b", "trouble b")
        clock[0] += 61
        log.warn("a", "trouble a")
    assert [record.message for record in caplog.records] == [
        "trouble a",
        "trouble b",
        "trouble a (9 more like it)",
    ]
