"""LMCache's own settings move over, or are named in an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmcache_core import Config, ConfigError
from lmcache_core.config.loading import load


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        monkeypatch.delenv(name)


def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> Config:
    for name, value in values.items():
        monkeypatch.setenv(f"LMCACHE_{name}", value)
    return load(None)


def said(monkeypatch: pytest.MonkeyPatch, **values: str) -> str:
    with pytest.raises(ConfigError) as raised:
        environment(monkeypatch, **values)
    return str(raised.value)


def tiers(config: Config) -> list[tuple[str, Any]]:
    return [(tier.backend, tier.options.capacity) for tier in config.tiers]


def test_the_environment_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = environment(
        monkeypatch,
        CHUNK_SIZE="64",
        LOCAL_CPU="True",
        MAX_LOCAL_CPU_SIZE="0.5",
        LOCAL_DISK=f"file://{tmp_path}",
        MAX_LOCAL_DISK_SIZE="2",
    )
    assert config.chunk_size == 64
    assert tiers(config) == [("local_cpu", 1 << 29), ("disk", 2 << 30)]
    assert config.tiers[1].options.path == tmp_path


def test_strict_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not environment(monkeypatch, LOCAL_CPU="1").strict
    assert environment(monkeypatch, STRICT="1").strict


@pytest.mark.parametrize("value", ["True", "true", "yes", "on", "1", "YES"])
def test_every_way_to_say_yes_means_yes(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    assert tiers(environment(monkeypatch, LOCAL_CPU=value)) == [("local_cpu", 5 << 30)]


def test_use_local_alone_switches_memory_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiers(environment(monkeypatch, USE_LOCAL="True")) == [("local_cpu", 5 << 30)]


def test_use_local_false_switches_both_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = said(monkeypatch, USE_LOCAL="no", LOCAL_CPU="yes", LOCAL_DISK=str(tmp_path))
    assert "nothing says where KV is to be stored" in text


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"LOCAL_CPU": "maybe"}, "environment: LMCACHE_LOCAL_CPU: expected true or false; found 'maybe'"),
        ({"LOCAL_CPU": "1", "CHUNK_SIZE": "abc"}, "LMCACHE_CHUNK_SIZE: expected an integer; found 'abc'"),
        ({"LOCAL_CPU": "1", "CHUNK_SIZE": "0"}, "LMCACHE_CHUNK_SIZE: expected greater"),
        ({"LOCAL_CPU": "1", "MAX_LOCAL_CPU_SIZE": "5GB"}, "LMCACHE_MAX_LOCAL_CPU_SIZE: expected a size in GiB"),
        ({"LOCAL_DISK": "/x"}, "LMCACHE_LOCAL_DISK: LMCACHE_MAX_LOCAL_DISK_SIZE (in GiB) must be set, too"),
        ({"LOCAL_DISK": "True"}, "LMCACHE_LOCAL_DISK: expected a directory; found 'True'"),
        ({"LOCAL_CPUS": "1"}, "known to nobody: LMCACHE_LOCAL_CPUS (did you mean 'LMCACHE_LOCAL_CPU'?)"),
        ({"ENABLE_BLENDING": "1"}, "LMCACHE_ENABLE_BLENDING: no equivalent here"),
        ({"USE_REMOTE": "True"}, "LMCACHE_USE_REMOTE: LMCACHE_REMOTE_URL must be set, too"),
        ({"REMOTE_URL": "lm://host:1"}, "LMCACHE_REMOTE_URL: no equivalent for lm://"),
        ({"REMOTE_URL": "redis://h", "REMOTE_SERDE": "cachegen"}, "LMCACHE_REMOTE_SERDE: no equivalent for 'cachegen'"),
        ({}, "nothing says where KV is to be stored"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_named(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], says: str
) -> None:
    assert says in said(monkeypatch, **values)


def test_a_file_of_ours_may_be_strict_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "cache.yaml"
    file.write_text("tiers: [{backend: local_cpu, capacity: 1GiB}]\n")
    assert environment(monkeypatch, CONFIG_FILE=str(file), STRICT="1").strict
    assert not environment(monkeypatch, CONFIG_FILE=str(file), STRICT="0").strict
    says = said(monkeypatch, CONFIG_FILE=str(file), STRICT="perhaps")
    assert "environment: LMCACHE_STRICT: expected true or false; found 'perhaps'" in says


def test_lmcaches_yaml_and_the_environment_over_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text("chunk_size: 256\nlocal_cpu: true\nmax_local_cpu_size: 3\nremote_url: null\n")
    assert tiers(load(file)) == [("local_cpu", 3 << 30)]
    config = environment(monkeypatch, CONFIG_FILE=str(file), MAX_LOCAL_CPU_SIZE="4")
    assert tiers(config) == [("local_cpu", 4 << 30)]


def test_lmcaches_yaml_names_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text("local_cpu: true\nenable_blending: true\n")
    with pytest.raises(ConfigError, match=r"lmcache.yaml:2: enable_blending: no equivalent"):
        load(file)


def test_our_yaml_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "cache.yaml"
    file.write_text("tiers: [{backend: local_cpu, capacity: 7}]")
    assert tiers(environment(monkeypatch, CONFIG_FILE=str(file))) == [("local_cpu", 7)]
    assert "LMCACHE_LOCAL_CPU: set beside LMCACHE_CONFIG_FILE" in said(monkeypatch, LOCAL_CPU="1")
