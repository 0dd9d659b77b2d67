"""Keys and values in the canonical layout: for serdes that look at them, and for other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lmcache_core
from tests.e2e.vllm.conftest import BLOCK, engine
from tests.e2e.vllm.test_connector import answers, flush, forget, prompt, worker


def disk(tmp_path: Path, *serde: Any, chunk: int = BLOCK) -> dict[str, Any]:
    tier = {"backend": "disk", "path": str(tmp_path / "kv"), "capacity": "1GiB"}
    return {"chunk_size": chunk, "tiers": [{**tier, "serde": list(serde)}]}


def stored(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("kv/chunks/*/*"))


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("chunk", [BLOCK, 8 * BLOCK])
def test_a_lossless_chain_that_looks_at_values(
    request: pytest.FixtureRequest, name: str, chunk: int, tmp_path: Path
) -> None:
    model, ids = request.getfixturevalue(name), prompt(300)
    with engine(model, disk(tmp_path, "byteplane", "zstd", chunk=chunk)) as llm:
        cold = answers(llm, ids)[0][0]
        forget(llm)
        ((tokens, reused),) = answers(llm, ids)
        assert tokens == cold
        assert reused == 299 // BLOCK * BLOCK


def test_a_lossy_chain_gets_the_values_it_should(llama: Path, tmp_path: Path) -> None:
    """What int8 brings back is near what vLLM computed, in vLLM's own packing."""
    ids = prompt(300)
    with engine(llama, disk(tmp_path, "int8")) as llm:
        answers(llm, ids)
        flush(llm)
        exact = kv(llm, 300 // BLOCK)
    with engine(llama, disk(tmp_path, "int8")) as llm:
        assert answers(llm, ids)[0][1] == 299 // BLOCK * BLOCK
        loaded = kv(llm, 299 // BLOCK)
    for block in loaded:
        errors = [(block - other).abs().max() for other in exact]
        assert 0 < min(errors) < 0.02 * block.abs().max()


def kv(llm: Any, count: int) -> list[torch.Tensor]:
    """The KV of blocks that vLLM has in its prefix cache, [layers, kv_heads, tokens, width]."""
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    cached = manager.block_pool.cached_block_hash_to_block._cache.values()
    ids = sorted(entry.block_id for entry in cached)[:count]
    layers = worker(llm)._worker._memory[0]._layers
    return [torch.stack([layer[i] for layer in layers]).clone() for i in ids]


def test_what_transformers_computed_serves_vllm_and_the_other_way_round(
    llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from lmcache_connectors.transformers import attach

    one, two = prompt(300), prompt(300, 1)
    shared = {**disk(tmp_path, chunk=2 * BLOCK), "share_as": "tiny llama"}
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()

    def generated(ids: list[int]) -> list[int]:
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        return out[0, len(ids) :].tolist()

    with engine(llama) as llm:
        plain = answers(llm, one)[0][0], answers(llm, two)[0][0]
    assert (generated(one), generated(two)) == plain

    with (
        lmcache_core.open({k: v for k, v in shared.items() if k != "share_as"}) as cache,
        attach(model, cache, share_as="tiny llama"),
    ):
        assert generated(one) == plain[0]
    with engine(llama, shared) as llm:
        assert answers(llm, one) == [(plain[0], 4 * 2 * BLOCK)]
        assert answers(llm, two)[0][0] == plain[1]
        flush(llm)
    with (
        lmcache_core.open({k: v for k, v in shared.items() if k != "share_as"}) as cache,
        attach(model, cache, share_as="tiny llama") as attached,
    ):
        assert attached.load_prefix(torch.tensor([two]))[1] == 4 * 2 * BLOCK
        assert generated(two) == plain[1]
        assert cache.stats()["loaded", "disk"] >= 4


def test_other_names_share_nothing(llama: Path, tmp_path: Path) -> None:
    ids = prompt(300)
    for name, reused in [("a", 0), ("b", 0), ("a", 8 * BLOCK)]:
        with engine(llama, {**disk(tmp_path), "share_as": name}) as llm:
            assert answers(llm, ids)[0][1] // (8 * BLOCK) * 8 * BLOCK == reused
            flush(llm)


@pytest.mark.parametrize(
    ("extra", "says"),
    [({"chunk_size": 48}, "multiple of vLLM's blocks of 32"), ({}, "multiple|group")],
)
def test_what_cannot_be_shared(
    gemma: Path, llama: Path, tmp_path: Path, extra: dict[str, Any], says: str
) -> None:
    model = llama if extra else gemma
    config = {**disk(tmp_path), "share_as": "x", "strict": True, **extra}
    with pytest.raises(Exception, match=says), engine(model, config):
        pass
