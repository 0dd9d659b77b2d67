"""While a model computes what it computed before, no hit is lost."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

import lmcache_core
from lmcache_connectors.transformers import attach
from tests.connectors.transformers.tiny import (
    CHUNK,
    FAMILIES,
    PREFIX,
    Answer,
    build,
    config,
    counted,
)
from tests.connectors.transformers.unchanged import FORMS, SERVED, SLOW

pytestmark = pytest.mark.filterwarnings("ignore")

HIT = PREFIX // CHUNK
ONCE = [0]
"""What a form leaves behind at its first time may look like a change."""
ROUNDS = 2
ROUNDS_WHEN_SOAKED = 6


def _cells(soaked: bool) -> Iterator[tuple[str, str]]:
    """Every form with every kind of model when soaked, else with one, another for each."""
    for number, form in enumerate(FORMS):
        for n, family in enumerate(FAMILIES):
            if soaked or (number % len(FAMILIES) == n and form not in SLOW):
                yield form, family


@functools.cache
def plain(family: str) -> Answer:
    return Answer.of(build(family))


def lost(form: str, family: str, rounds: int) -> list[int]:
    """The rounds whose call after `form` found less than all; its answer is right in any case."""
    model = build(family)
    misses = []
    with lmcache_core.open(config()) as cache, attach(model, cache):
        count = functools.partial(counted, cache)
        Answer.of(model)
        assert count("stored"), "the model is refused"
        for number in range(rounds):
            before = count("loaded")
            FORMS[form](model)
            if number and form in SERVED:
                assert count("loaded") > before, "a call of this form is not served"
            before = count("loaded")
            got = Answer.of(model)
            if count("loaded") - before < HIT:
                misses.append(number)
            assert torch.equal(got.tokens, plain(family).tokens)
            assert got.same_prefix(plain(family))
    return misses


@pytest.mark.parametrize(("form", "family"), list(_cells(soaked=False)))
def test_no_hit_is_lost(form: str, family: str) -> None:
    assert lost(form, family, ROUNDS) in ([], ONCE)


@pytest.mark.soak
@pytest.mark.parametrize(("form", "family"), list(_cells(soaked=True)))
def test_no_hit_is_lost_however_often(form: str, family: str) -> None:
    assert lost(form, family, ROUNDS_WHEN_SOAKED) in ([], ONCE)


def test_the_forms_are_many() -> None:
    assert len(FORMS) >= 40
    assert len(list(_cells(soaked=True))) * ROUNDS_WHEN_SOAKED >= 1000
