"""Plugins hear what happens; one that fails is not felt."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from prometheus_client import REGISTRY

import lmcache_core
from lmcache_core import ConfigError, Namespace, hookimpl
from lmcache_core.plugins.log import LOG, RateLimitedLog

MEMORY = {"backend": "local_cpu", "capacity": "1MiB"}


def test_prometheus_counts_what_the_engine_does(namespace: Namespace, gather: Any) -> None:
    def value(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    stored = value("lmcache_stored_chunks_total", tier="local_cpu")
    missed = value("lmcache_missed_chunks_total", tier="", reason="absent")
    with lmcache_core.open({"chunk_size": 4, "tiers": [MEMORY]}) as cache:
        keys = namespace.keys(range(8), 4)
        cache.lookup(keys)
        cache.store(namespace, keys, gather)
    assert value("lmcache_stored_chunks_total", tier="local_cpu") == stored + 2
    assert value("lmcache_missed_chunks_total", tier="", reason="absent") == missed + 2


def test_a_plugin_hears_and_adds_to_the_namespace(namespace: Namespace, gather: Any) -> None:
    class Plugin:
        heard: list[str] = []  # noqa: RUF012

        @hookimpl
        def lmcache_stored(self, tier: str) -> None:
            self.heard.append(tier)

        @hookimpl
        def lmcache_namespace(self, fields: dict[str, object]) -> dict[str, str]:
            return {"cluster": f"of {fields['model']}"}

    plugin = Plugin()
    config = lmcache_core.Config(chunk_size=4, tiers=[MEMORY])
    with lmcache_core.open(config, plugins=[plugin]) as cache:
        ns = cache.namespace(model="m", layout=namespace.layout)
        assert ns.extra == {"cluster": "of m"}
        cache.store(ns, ns.keys(range(4), 4), gather)
    assert plugin.heard == ["local_cpu"]


def test_a_plugin_that_raises_is_logged_once(
    namespace: Namespace, gather: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @hookimpl
        def lmcache_stored(self) -> None:
            raise RuntimeError("plugin trouble")

    LOG._seen.clear()
    with lmcache_core.open({"chunk_size": 4, "tiers": [MEMORY]}, plugins=[Broken()]) as cache:
        for first in range(5):
            keys = namespace.keys([first, 1, 2, 3], 4)
            assert cache.store(namespace, keys, gather) == 1
            assert len(list(cache.load(keys))) == 1
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert "plugin trouble" in lines[0]


def test_an_object_with_a_misspelt_hook_is_a_config_error() -> None:
    class Misspelt:
        @hookimpl
        def lmcache_stored(self, teir: str) -> None: ...

    with pytest.raises(ConfigError, match="teir"):
        lmcache_core.open({"tiers": [MEMORY]}, plugins=[Misspelt()])


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
