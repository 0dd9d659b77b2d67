"""Any mapping is a Config or a ConfigError, and neither shows what may be a secret."""

from __future__ import annotations

import logging
import traceback
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_core import Config, ConfigError, TierConfig
from lmcache_core.config.loading import load
from lmcache_core.config.models import TierConfig as Model
from lmcache_core.plugins.registry import known

WORD = "hunter2SECRET"
URLS = [
    f"redis://u:{WORD}@h", f"redis://:{WORD}@h:bad", f"rediss://u:{WORD}@h1,h2/x", f"redis:{WORD}@h",
    f"u:{WORD}@h", f"s3://KEY:{WORD}", f"s3://KEY:{WORD}/b", f"s3:KEY:{WORD}@b", f"unix:u:{WORD}@/x",
    f"memcached:u:{WORD}@h", f"memcached://h?password={WORD}", f" 'redis://u:{WORD}@h' ",
    f"redis://u:{WORD}@h\nx", f"redis-sentinel://u:{WORD}@h", f"nobody://u:{WORD}@h:1/p",
]  # fmt: skip
KEYS = sorted(
    {
        "chunk_size",
        "tiers",
        "load",
        "strict",
        "local_cpu",
        "local_disk",
        "remote_url",
        "extra_config",
    }
    | set(Model.model_fields)
    | {"url", "capacity", "path", "pool", "endpoint", "tls", "password_env", "eviction", "level"}
)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(URLS),
    st.sampled_from([*known("backends"), *known("serdes"), "8GiB", "1s", "lru", 10**400, b"x"]),
)  # fmt: skip
ANYTHING = st.recursive(
    VALUES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.sampled_from(URLS), VALUES), inner, max_size=4),
    ),
    max_leaves=8,
)  # fmt: skip
TIERS = st.fixed_dictionaries(
    {"backend": st.sampled_from([*known("backends"), "redis://h", 3])},
    optional={key: ANYTHING for key in KEYS if key != "backend"},
)
CONFIGS = st.one_of(
    ANYTHING.filter(lambda value: isinstance(value, dict)),
    st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=4),
    st.fixed_dictionaries({"tiers": st.lists(TIERS, min_size=1, max_size=2)}),
)
ANY = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def text_of(build: Any) -> str:
    """What a Config shows of itself, or what its error does."""
    try:
        built = build()
    except ConfigError as error:
        return "".join(traceback.format_exception(error))
    return f"{built!r} {built}"


def hidden(text: str) -> bool:
    # Source lines of a traceback may hold the word: only the messages count.
    return WORD not in text


@ANY
@given(CONFIGS)
def test_any_mapping_is_a_config_or_a_config_error(
    caplog: pytest.LogCaptureFixture, data: dict[Any, Any]
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert hidden(text_of(lambda: load(data)))
    assert hidden(caplog.text)


@ANY
@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=4))
def test_so_it_is_for_what_is_built_by_hand(data: dict[str, Any]) -> None:
    for build in (lambda: TierConfig(**data), lambda: Config(**data)):
        assert hidden(text_of(build))


@ANY
@given(CONFIGS)
def test_so_it_is_for_any_yaml(tmp_path: Any, data: dict[Any, Any]) -> None:
    file = tmp_path / "cache.yaml"
    try:
        file.write_text(yaml.safe_dump(data))
    except (yaml.YAMLError, ValueError):  # a number of thousands of digits
        return
    assert hidden(text_of(lambda: load(file)))


@pytest.mark.parametrize(
    "line",
    [f"url: *{WORD}", f"url: !{WORD} x", f"url: &{WORD} [", f"'redis://u:{WORD}@h': 1\n  'redis://u:{WORD}@h': 2",
     f"? [redis://u:{WORD}@h]\n  : 1", f"url: 'redis://u:{WORD}@h", f"url: redis://u:{WORD}@h: x"],
)  # fmt: skip
def test_so_it_is_for_what_is_no_yaml(tmp_path: Any, line: str) -> None:
    file = tmp_path / "cache.yaml"
    file.write_text(f"tiers:\n- backend: redis\n  {line}\n")
    assert hidden(text_of(lambda: load(file)))


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError(WORD)


def test_so_it_is_for_values_that_cannot_be_shown() -> None:
    endless: dict[str, Any] = {}
    endless["x"] = endless
    for value in (10**5000, Unspeakable(), endless):
        for data in ({"chunk_size": value}, {"tiers": value}, {"tiers": [value]}):
            assert hidden(text_of(lambda data=data: load(data)))  # type: ignore[misc]
        for key in ("capacity", "deadline", "serde", "name", "eviction"):
            tier = {"backend": "local_cpu", "capacity": 9, key: value}
            assert hidden(text_of(lambda tier=tier: load({"tiers": [tier]})))  # type: ignore[misc]
