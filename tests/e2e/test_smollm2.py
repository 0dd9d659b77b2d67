"""The main job on the real model: a document's KV is computed once and reused everywhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, pipeline

import lmcache_core
from lmcache_connectors.transformers import attach
from tests.e2e.conftest import CHUNK, DOCUMENT, Node, answer, smollm2

pytestmark = pytest.mark.xdist_group("smollm2")

SHARED = DOCUMENT // CHUNK
"""Whole chunks of the document."""


def config(folder: Path, capacity: str = "1GiB") -> dict[str, Any]:
    return {
        "chunk_size": CHUNK,
        "tiers": [
            {"backend": "local_cpu", "capacity": capacity},
            {"backend": "disk", "path": str(folder), "capacity": "1GiB", "serde": ["zstd"]},
        ],
    }


def loaded(cache: lmcache_core.CacheEngine) -> dict[str, int]:
    return {event[1]: n for event, n in cache.stats().items() if event[0] == "loaded"}


def test_two_questions_from_memory_then_from_another_process(
    smollm: tuple[Any, Any],
    prompts: list[torch.Tensor],
    answers: list[torch.Tensor],
    nodes: list[Node],
    tmp_path: Path,
) -> None:
    model, _ = smollm
    raw = config(tmp_path)
    raw["tiers"][1].pop("serde")
    with lmcache_core.open(raw) as cache, attach(model, cache):
        for ids, tokens in zip(prompts, answers, strict=True):
            assert torch.equal(answer(model, ids), tokens)
        assert loaded(cache) == {"local_cpu": SHARED}
    for ids, tokens in zip(prompts, answers, strict=True):
        said = nodes[0].answer(raw["tiers"][1], ids)
        assert said["output"] == tokens.tolist()
        assert said["loaded"] == {"disk": 2 * ((ids.shape[1] - 1) // CHUNK)}  # of two answers


def test_a_process_killed_while_it_stores_leaves_a_prefix_that_is_right(
    smollm: tuple[Any, Any],
    prompts: list[torch.Tensor],
    answers: list[torch.Tensor],
    tmp_path: Path,
) -> None:
    model, ids, expected = smollm[0], prompts[0], answers[0]
    plain = config(tmp_path)
    plain["tiers"][1].pop("serde")
    node = Node()
    try:
        node.ready()
        node.ask(plain["tiers"][1], ids)
        end = time.monotonic() + 120
        while not list(tmp_path.glob("chunks/*/*")) and time.monotonic() < end:
            time.sleep(0.001)
    finally:
        node.close()
    stored = len(list(tmp_path.glob("chunks/*/*")))
    assert stored >= 1
    with lmcache_core.open(plain) as cache, attach(model, cache):
        assert torch.equal(answer(model, ids), expected)
        assert 1 <= sum(loaded(cache).values()) <= stored


def test_memory_smaller_than_the_document(
    smollm: tuple[Any, Any],
    prompts: list[torch.Tensor],
    answers: list[torch.Tensor],
    tmp_path: Path,
) -> None:
    model, _ = smollm
    with lmcache_core.open(config(tmp_path, "8MiB")) as cache, attach(model, cache):
        answer(model, prompts[0])
        assert cache.flush(60)
        assert torch.equal(answer(model, prompts[1]), answers[1])
        assert sum(loaded(cache).values()) == SHARED
        assert loaded(cache)["disk"] > 0


SHORT = 3 * CHUNK
"""Tokens of the document's end: many CPUs are slow in bfloat16."""


def test_bf16_equals_the_same_split_prefill_without_storage(
    prompts: list[torch.Tensor], tmp_path: Path
) -> None:
    model, _ = smollm2.load(torch.bfloat16)
    one, two = (ids[:, DOCUMENT - SHORT :] for ids in prompts)
    with lmcache_core.open(config(tmp_path)) as cache, attach(model, cache):
        first = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=one, cache=first, use_cache=True, logits_to_keep=1)
        answer(model, one)
        got = answer(model, two)
        assert loaded(cache) == {"local_cpu": SHORT // CHUNK}
    first.crop(SHORT - one.shape[1])
    expected = model.generate(two, cache=first, max_new_tokens=16, do_sample=False)
    assert torch.equal(got, expected)


def test_a_pipeline_and_a_batch_of_chats(
    smollm: tuple[Any, Any], document: torch.Tensor, tmp_path: Path
) -> None:
    model, tokenizer = smollm
    text = tokenizer.decode(document[0, :128])
    questions = (
        "What is assert?",
        "What is a coroutine?",
        "And what is a lambda, in one sentence?",
    )
    chats = [[{"role": "user", "content": f"{text}\n\n{question}"}] for question in questions]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 12, "do_sample": False, "batch_size": 3}
    expected = pipe(chats, **settings)
    with lmcache_core.open(config(tmp_path)) as cache, attach(model, cache):
        assert pipe(chats, **settings) == expected
        assert pipe(chats, **settings) == expected
        assert loaded(cache)["local_cpu"] >= 3 * (128 // CHUNK)
