"""Whatever changes what a model computes, KV of before is not used for it, and none of it is
found by a model that has not changed.

All rows share one store, as the users of a server do: what one leaves under a name that it may not
have, another finds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

import lmcache_core
from lmcache_connectors.transformers import attach
from lmcache_core import CacheEngine
from tests.connectors.transformers.mutations import TABLE, Mutation, output
from tests.connectors.transformers.mutations.unseen import UNSEEN
from tests.connectors.transformers.tiny import (
    CHUNK,
    COMBINATIONS,
    DTYPES,
    FAMILIES,
    PROMPT_TOKENS,
    Answer,
    build,
    config,
    counted,
    tokens,
)

# Minutes: `make soak` runs them.
pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]


def _cells(number: int, mutation: Mutation) -> list[tuple[str, str]]:
    """The models that a row fits, another one first for each."""
    turn = number % len(COMBINATIONS)
    fit = [
        (family, dtype)
        for family, dtype in COMBINATIONS[turn:] + COMBINATIONS[:turn]
        if family in mutation.families and dtype in mutation.dtypes
    ]
    assert fit, mutation.name
    return fit


def _parameters() -> Iterator[object]:
    """Every row with one model; with all that it fits when soaked."""
    for number, mutation in enumerate(TABLE):
        for n, (family, dtype) in enumerate(_cells(number, mutation)):
            marks = [pytest.mark.soak] if n or mutation.soak else []
            name = f"{mutation.name}-{family}-{dtype}"
            yield pytest.param(mutation, family, dtype, id=name, marks=marks)


class Unchanged(NamedTuple):
    """A model that stays as it was built, attached to the store that all share."""

    model: Any
    plain: Answer
    """Its answer without us."""


class Shared(NamedTuple):
    """The store, and a model of each kind that nobody changes."""

    cache: CacheEngine
    models: dict[tuple[str, str], Unchanged]


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    models = {}
    with lmcache_core.open(config()) as cache:
        for family, dtype in COMBINATIONS:
            model = build(family, dtype)
            plain = Answer.of(model)
            attach(model, cache)
            models[family, dtype] = Unchanged(model, plain)
        yield Shared(cache, models)


@pytest.mark.parametrize(("mutation", "family", "dtype"), list(_parameters()))
def test_a_changed_model_answers_as_it_is_now(
    mutation: Mutation, family: str, dtype: str, shared: Shared
) -> None:
    cache, unchanged = shared.cache, shared.models[family, dtype]
    count = functools.partial(counted, cache)
    model = build(family, dtype)
    steps = mutation.run(model)
    asked = next(steps)
    with attach(model, cache):
        used = count("stored") + count("loaded")
        before = Answer.of(asked)
        served = count("stored") + count("loaded") > used
        asked = next(steps)
        loaded = count("loaded")
        got = Answer.of(asked)
        loaded = count("loaded") - loaded
        again = Answer.of(asked)
    want = Answer.of(asked)
    next(steps, None)

    altered = not before.same_prefix(want)
    assert mutation.alters is None or altered == mutation.alters, "the row is not true"
    assert got.same_prefix(want), "KV of the model as it was"
    assert again.same_prefix(want), "KV of the model as it was, when asked again"
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(again.tokens, want.tokens)
    assert loaded or got.same(want)
    assert served or mutation.refused, "the model was refused before it changed"
    found = Answer.of(unchanged.model)
    assert found.same_prefix(unchanged.plain), "an unchanged model found KV of another"
    assert torch.equal(found.tokens, unchanged.plain.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_changes_during_a_call_stores_nothing_of_it(
    family: str, shared: Shared
) -> None:
    unchanged = shared.models[family, "float32"]
    model, prompt = build(family), tokens(1, PROMPT_TOKENS, seed=7)
    calls = []

    def change(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            output(model).weight.data.mul_(1.5)
        return scores

    with attach(model, shared.cache):
        stored = counted(shared.cache, "stored")
        how = {"max_new_tokens": 3 * CHUNK, "do_sample": False, "eos_token_id": None}
        out = model.generate(prompt, logits_processor=[change], **how)
        again = Answer.of(model, out)
    assert len(calls) == 3 * CHUNK
    assert again.close(Answer.of(model, out))
    assert Answer.of(unchanged.model, out).close(Answer.of(build(family), out))
    assert counted(shared.cache, "stored") > stored  # of the two that asked about all of it


def test_the_table_is_large_and_covers_every_model() -> None:
    assert len(TABLE) >= 120
    ordinary = [_cells(number, row)[0] for number, row in enumerate(TABLE) if not row.soak]
    for family in FAMILIES:
        for dtype in DTYPES:
            assert ordinary.count((family, dtype)) >= 10


@pytest.mark.parametrize("change", UNSEEN, ids=lambda change: change.__name__)
def test_what_no_means_can_see_does_change_what_is_computed(change: Any) -> None:
    """These are apart from the table because nothing would notice them, and not for ease."""
    model = build("llama")
    steps = change(model)
    next(steps)
    before = Answer.of(model)
    next(steps)
    assert not before.same_prefix(Answer.of(model))
    next(steps, None)
