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
    FAMILIES,
    PROMPT_TOKENS,
    Answer,
    build,
    config,
    counted,
    tokens,
)

pytestmark = pytest.mark.filterwarnings("ignore")
DENSE = ("llama", "float32")


def _fits(mutation: Mutation) -> list[tuple[str, str]]:
    """The models that a row is for."""
    return [
        (family, dtype)
        for family, dtype in COMBINATIONS
        if family in mutation.families and dtype in mutation.dtypes
    ]


def _is_ordinary(number: int, mutation: Mutation) -> bool:
    """Half of those that no other stands for, with the dense model; the rest takes an hour."""
    return number % 2 == 0 and not mutation.soak and DENSE in _fits(mutation)


def _parameters() -> Iterator[object]:
    """Every row with every model that it fits."""
    for number, mutation in enumerate(TABLE):
        for cell in _fits(mutation):
            ordinary = cell == DENSE and _is_ordinary(number, mutation)
            name = f"{mutation.name}-{'-'.join(cell)}"
            marks = [] if ordinary else [pytest.mark.soak]
            yield pytest.param(mutation, *cell, id=name, marks=marks)


class Unchanged(NamedTuple):
    """A model that stays as it was built, attached to the store that all share."""

    model: Any
    plain: Answer
    """Its answer without us."""


class Shared:
    """The store, and a model of each kind that nobody changes."""

    def __init__(self, cache: CacheEngine) -> None:
        self.cache = cache

    @functools.cache  # noqa: B019
    def unchanged(self, family: str, dtype: str) -> Unchanged:
        model = build(family, dtype)
        plain = Answer.of(model)
        attach(model, self.cache)
        return Unchanged(model, plain)


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    with lmcache_core.open(config()) as cache:
        yield Shared(cache)


@pytest.mark.parametrize(("mutation", "family", "dtype"), list(_parameters()))
def test_a_changed_model_answers_as_it_is_now(
    mutation: Mutation, family: str, dtype: str, shared: Shared
) -> None:
    cache, unchanged = shared.cache, shared.unchanged(family, dtype)
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
    unchanged = shared.unchanged(family, "float32")
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
    ordinary = [row for number, row in enumerate(TABLE) if _is_ordinary(number, row)]
    assert len(ordinary) >= 120
    cells = [cell for row in TABLE for cell in _fits(row)]
    assert min(cells.count(cell) for cell in COMBINATIONS) >= 120


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
