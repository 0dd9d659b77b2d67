"""How a connector starts: config, strict, and the one line that says why it is off."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lmcache_core import ConfigError
from lmcache_core.connector import go_on_without, is_strict, read_config

TIERS = [{"backend": "local_cpu", "capacity": "1MiB"}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cache.yaml"
    path.write_text("strict: true\ntiers:\n  - backend: local_cpu\n    capacity: 2MiB\n")
    return path


def test_an_entry_holds_the_keys_of_a_file() -> None:
    config = read_config({"tiers": TIERS, "chunk_size": 16}, "extra")
    assert (config.chunk_size, config.strict) == (16, False)


def test_or_names_one(file: Path) -> None:
    config = read_config({"config_file": str(file)}, "extra")
    assert config.tiers[0].options.model_dump()["capacity"] == 2 << 20
    assert config.strict


def test_but_not_both(file: Path) -> None:
    with pytest.raises(ConfigError, match="extra: expected either config_file or its keys"):
        read_config({"config_file": str(file), "tiers": TIERS}, "extra")


def test_with_nothing_but_strict_the_environment_says(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(file))
    assert read_config({}, "extra").tiers[0].backend == "local_cpu"
    assert read_config({"strict": True}, "extra").strict


def test_strict_is_read_from_a_file_that_is_wrong_in_all_else(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("strict: true\nteirs: []\n")
    assert is_strict({"config_file": str(wrong)})
    assert not is_strict({})


def test_an_engine_goes_on_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lmcache_core"):
        for _ in range(3):
            go_on_without("toy", ConfigError("tiers: required"), strict=False)
    (line,) = caplog.messages
    assert line == "lmcache-core is off, toy goes on without it: tiers: required"


def test_unless_it_is_strict() -> None:
    with pytest.raises(ConfigError, match="required"):
        go_on_without("toy", ConfigError("tiers: required"), strict=True)
