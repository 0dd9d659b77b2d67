"""What a model's config says of its KV."""

from __future__ import annotations

import pytest

from lmcache_core.connector import config_digest, depends_on_length, rope_types

CONFIG = {"hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


@pytest.mark.parametrize(
    "more",
    [{"_name_or_path": "/elsewhere"}, {"transformers_version": "9"}, {"use_cache": False}],
)
def test_names_and_versions_are_no_part_of_it(more: dict[str, object]) -> None:
    assert config_digest({**CONFIG, **more}) == config_digest(CONFIG)


def test_everything_else_is() -> None:
    other = {**CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert config_digest(other) != config_digest(CONFIG)


@pytest.mark.parametrize(
    ("fields", "kinds", "by_length"),
    [
        ({}, set(), False),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, {"dynamic"}, True),
        ({"rope_scaling": {"type": "longrope"}}, {"longrope"}, True),
        ({"rope_parameters": {"full": {"rope_type": "yarn"}}}, {"yarn"}, False),
        ({"text_config": {"layers": [{"rope_type": "longrope"}]}}, {"longrope"}, True),
        ({"description": "dynamic", "rope_scaling": None}, set(), False),
    ],
)
def test_kinds_of_rope_are_found_wherever_they_stand(
    fields: dict[str, object], kinds: set[str], by_length: bool
) -> None:
    assert rope_types(fields) == kinds
    assert depends_on_length(fields) == by_length
