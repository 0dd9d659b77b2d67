"""How blocks become chunks: small ones are stored together, and no reuse is lost by it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.vllm.conftest import BLOCK, engine
from tests.e2e.vllm.test_connector import answers, connector, flush, forget, prompt


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    """With chunks of several blocks: these of the tiny model take 32 KiB each."""
    tier = {"backend": "disk", "path": str(tmp_path / "kv"), "capacity": "1GiB"}
    return {"tiers": [tier]}


def files(tmp_path: Path) -> int:
    return len(list((tmp_path / "kv").glob("chunks/*/*")))


def test_small_blocks_are_stored_together_and_the_last_ones_too(
    llama: Path, disk: dict[str, Any], tmp_path: Path
) -> None:
    ids = prompt(300)
    with engine(llama, disk) as llm:
        cold = answers(llm, ids)[0][0]
        assert connector(llm)._scheduler._chunk == 8 * BLOCK
        flush(llm)
        assert files(tmp_path) == 2  # 8 blocks, and the one behind them
        for length in (300, 289, 288):
            forget(llm)
            ((tokens, reused),) = answers(llm, ids[:length])
            assert reused == (length - 1) // BLOCK * BLOCK
            assert length < 300 or tokens == cold


def test_where_prompts_part_becomes_the_end_of_a_chunk(llama: Path, disk: dict[str, Any]) -> None:
    """The first two tell by vLLM's own prefix cache how far they agree; from then on it is
    stored that far, for every other process."""
    document = prompt(330)
    with engine(llama, disk) as llm:
        answers(llm, [*document, *prompt(100, 1)])
        answers(llm, [*document, *prompt(100, 2)])
        forget(llm)
        assert answers(llm, [*document, *prompt(100, 3)])[0][1] == 330 // BLOCK * BLOCK


def test_a_prompt_that_grows_reuses_all_blocks(llama: Path, disk: dict[str, Any]) -> None:
    """A conversation: each turn begins with all that was said before."""
    said = prompt(100)
    before = 1
    with engine(llama, disk) as llm:
        for turn in range(8):
            forget(llm)
            ((tokens, reused),) = answers(llm, said)
            assert reused >= (before - 1) // BLOCK * BLOCK
            before = len(said)
            said = [*said, *tokens, *prompt(random.Random(turn).randrange(5, 60), turn)]


def test_chunks_that_fill_up_while_it_generates(llama: Path, disk: dict[str, Any]) -> None:
    from vllm import SamplingParams

    ids = prompt(200)
    long = SamplingParams(temperature=0, max_tokens=400, detokenize=False, ignore_eos=True)
    with engine(llama, disk) as llm:
        out = llm.generate([{"prompt_token_ids": ids}], long, use_tqdm=False)[0]
        said = [*ids, *out.outputs[0].token_ids]
        forget(llm)
        assert answers(llm, [*said, 7])[0][1] == 599 // BLOCK * BLOCK
