"""Requests that do not go the straight way: aborted, speculated, of other kinds of attention."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from lmcache_connectors.vllm import scheduler as scheduling
from lmcache_connectors.vllm import worker as working
from lmcache_connectors.vllm.connector import LmcacheCoreConnector
from lmcache_connectors.vllm.lookup import Lookup
from lmcache_connectors.vllm.messages import Metadata
from lmcache_core.connector import PagedMemory
from tests.e2e.vllm.conftest import BLOCK, engine, saved
from tests.e2e.vllm.test_connector import (
    GREEDY,
    answers,
    connector,
    flush,
    forget,
    prompt,
    redis,
    worker,
)
from tests.servers import Server

__all__ = ["redis"]


@pytest.mark.parametrize("name", ["llama", "gemma", "mistral"])
def test_nothing_is_stored_on_top_of_what_did_not_come(
    name: str, request: pytest.FixtureRequest, disk: dict[str, Any], tmp_path: Path
) -> None:
    """A load fails in its middle; what the request computes then serves later engines rightly."""
    model = request.getfixturevalue(name)
    short, long = prompt(300), [*prompt(300), *prompt(300, 1)]
    with engine(model) as llm:
        cold = answers(llm, long)[0][0]
    with engine(model, disk) as llm:
        answers(llm, short)
        flush(llm)
    for number, file in enumerate(sorted((tmp_path / "kv").glob("chunks/*/*"))):
        if number % 3 == 0:
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
    with engine(model, disk) as llm:
        assert answers(llm, long)[0][0] == cold
        flush(llm)
    with engine(model, disk) as llm:
        for _ in range(20):  # each finds one more that is damaged, and stores it anew
            ((tokens, reused),) = answers(llm, long)
            assert tokens == cold
            forget(llm)
        assert reused == 599 // BLOCK * BLOCK
        assert not any(event == "damaged" for event in misses(llm))


def misses(llm: Any) -> list[str]:
    """Why chunks were missed in the last request."""
    cache = connector(llm)._scheduler._cache.engine
    before = cache.stats()
    answers(llm, [*prompt(300), *prompt(300, 1)])
    return [
        name[1]
        for name, n in cache.stats().items()
        if name[0] == "missed" and n > before.get(name, 0)
    ]


def test_a_request_that_is_aborted_while_its_kv_is_loaded(
    llama: Path, redis: tuple[dict[str, Any], Server]
) -> None:
    extra, server = redis
    extra["tiers"][0]["deadline"] = "3s"
    ids = prompt(400)
    with engine(llama, extra) as llm:
        cold = answers(llm, ids)[0][0]
        forget(llm)
        core = llm.llm_engine
        core.add_request("a", {"prompt_token_ids": ids}, GREEDY)
        (known,) = connector(llm)._scheduler._requests.values()
        assert known.lookup.result(10).tokens > 0
        server.freeze()
        core.step()
        assert worker(llm)._worker._loads
        core.abort_request(["a"])
        server.thaw()
        for _ in range(100):
            core.step()
        assert answers(llm, ids)[0][0] == cold
        assert not worker(llm)._worker._loads
        forget(llm)  # all blocks are free


def test_requests_of_different_priority(llama: Path, disk: dict[str, Any]) -> None:
    prompts = [[*prompt(200), *prompt(60, n)] for n in range(1, 9)]
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    with engine(llama) as llm:
        plain = [tokens for tokens, _ in answers(llm, *prompts)]
    options = {"scheduling_policy": "priority", "max_num_seqs": 2, "num_gpu_blocks_override": 24,
               "max_model_len": 320}  # fmt: skip
    with engine(llama, disk, **options) as llm:
        for _ in range(2):
            outs = llm.generate(asked, GREEDY, priority=[n % 3 for n in range(8)], use_tqdm=False)
            assert [list(out.outputs[0].token_ids) for out in outs] == plain
            forget(llm)
        assert outs[0].num_cached_tokens == 259 // BLOCK * BLOCK


def test_speculation(llama: Path, tmp_path: Path) -> None:
    """With n-grams of the prompt as drafts. In a process of its own: it changes what vLLM builds
    in a process afterwards."""
    script = f"""
import sys
from pathlib import Path
from tests.e2e.vllm import test_requests
test_requests.speculate(Path({str(llama)!r}), Path({str(tmp_path)!r}))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


def speculate(model: Path, folder: Path) -> None:
    tier = {"backend": "disk", "path": str(folder / "kv"), "capacity": "1GiB"}
    disk = {"chunk_size": BLOCK, "tiers": [tier]}
    ids = prompt(30) * 8
    long = SamplingParams(temperature=0, max_tokens=120, detokenize=False, ignore_eos=True)
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}

    def run(llm: Any, tokens: list[int]) -> tuple[list[int], int]:
        (out,) = llm.generate([{"prompt_token_ids": tokens}], long, use_tqdm=False)
        return list(out.outputs[0].token_ids), out.num_cached_tokens

    with engine(model) as llm:
        plain, _ = run(llm, ids)
        turn = [*ids, *plain, *prompt(20, 1)]
        then, _ = run(llm, turn)
    with engine(model, disk, speculative_config=ngram) as llm:
        assert run(llm, ids)[0] == plain
        forget(llm)
        assert run(llm, ids) == (plain, 239 // BLOCK * BLOCK)
        forget(llm)
        tokens, reused = run(llm, turn)
        assert tokens == then
        assert reused >= 350 // BLOCK * BLOCK  # drafts that were refused are in no block


def test_attention_with_a_latent_vector(disk: dict[str, Any], tmp_path: Path) -> None:
    """DeepSeek's MLA: one vector a token in place of keys and values."""
    from transformers import DeepseekV2Config

    config = DeepseekV2Config(
        hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None,
        qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, vocab_size=512,
        max_position_embeddings=2048, n_group=1, topk_group=1,
    )  # fmt: skip
    model = saved(config, tmp_path / "deepseek")
    ids = prompt(300)
    with engine(model, dtype="bfloat16") as llm:
        plain = answers(llm, ids)
    with engine(model, disk, dtype="bfloat16") as llm:
        assert answers(llm, ids) == plain
        flush(llm)
    with engine(model, disk, dtype="bfloat16") as llm:
        assert answers(llm, ids)[0][1] > 0


def test_a_step_that_computes_does_not_wait_for_loads(
    llama: Path, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs vLLM starts background loads where its forward context is gone already."""
    from vllm.forward_context import get_forward_context, set_forward_context

    idle: list[bool] = []
    waited: list[bool] = []
    start = LmcacheCoreConnector.start_load_kv
    endless = SimpleNamespace(end=Future())

    def without_context(self: Any, context: Any, **more: Any) -> None:
        idle.append(context.attn_metadata is None)
        waited.append(False)
        self._worker._loads["another"] = endless
        with set_forward_context(None, self._vllm_config):
            start(self, get_forward_context(), **more)
        del self._worker._loads["another"]

    def noted(jobs: Any, *_: Any, **__: Any) -> None:
        waited[-1] |= len(jobs) > 0

    with engine(llama, disk) as llm, monkeypatch.context() as patch:
        patch.setattr(LmcacheCoreConnector, "start_load_kv", without_context)
        patch.setattr(working, "wait", noted)
        answers(llm, prompt(300))
        forget(llm)
        answers(llm, prompt(300))
        assert set(waited) == {False, True}
        assert waited == idle


def test_many_lookups_that_last_hold_up_no_step(
    llama: Path, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step waits for all of them as long as for one."""
    answered = Event()
    find = Lookup.find

    def late(self: Any, *arguments: Any) -> Any:
        answered.wait(60)
        return find(self, *arguments)

    monkeypatch.setattr(scheduling, "INLINE_SECONDS", 0.2)
    monkeypatch.setattr(Lookup, "find", late)
    with engine(llama, disk) as llm:
        core = llm.llm_engine
        for n in range(50):
            core.add_request(str(n), {"prompt_token_ids": prompt(64, n)}, GREEDY)
        core.step()
        began = time.monotonic()
        core.step()
        assert time.monotonic() - began < 5
        answered.set()
        while core.has_unfinished_requests():
            core.step()


def test_what_was_announced_and_never_comes_holds_up_nobody_else(
    llama: Path, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "ANNOUNCED_SECONDS", 600)
    params = {"kv_transfer_params": {scheduling.ANNOUNCED: 64}}
    promised = SamplingParams(temperature=0, max_tokens=2, detokenize=False, extra_args=params)
    with engine(llama, disk) as llm:
        core = llm.llm_engine
        for n in range(20):
            core.add_request(str(n), {"prompt_token_ids": prompt(100, n)}, promised)
        core.add_request("other", {"prompt_token_ids": prompt(100, 99)}, GREEDY)
        while not any(out.finished for out in core.step()):
            pass
        assert core.get_num_unfinished_requests() == 20
        monkeypatch.setattr(scheduling, "ANNOUNCED_SECONDS", 0)
        for known in connector(llm)._scheduler._requests.values():
            known.until = time.monotonic()
        while core.has_unfinished_requests():
            core.step()


def test_what_was_announced_is_not_waited_for_where_its_store_is_dead(
    llama: Path, redis: tuple[dict[str, Any], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "ANNOUNCED_SECONDS", 600)
    extra, server = redis
    params = {"kv_transfer_params": {scheduling.ANNOUNCED: 64}}
    promised = SamplingParams(temperature=0, max_tokens=2, detokenize=False, extra_args=params)
    with engine(llama, extra) as llm:
        server.kill()
        for n in range(3):
            llm.generate({"prompt_token_ids": prompt(100, n)}, promised, use_tqdm=False)
        assert connector(llm)._scheduler._alone()


def test_drafts_that_run_ahead_of_what_is_known(llama: Path, disk: dict[str, Any]) -> None:
    """Asynchronous scheduling counts drafts as computed before anybody knows what they are."""
    with engine(llama, disk) as llm:
        core = llm.llm_engine
        core.add_request("a", {"prompt_token_ids": prompt(2 * BLOCK)}, GREEDY)
        scheduler = connector(llm)._scheduler
        step, ends = scheduler.step, []

        def ahead(output: Any) -> Metadata:
            for new in output.scheduled_new_reqs:
                new.num_computed_tokens = 4 * BLOCK
            metadata = step(output)
            for new in output.scheduled_new_reqs:
                new.num_computed_tokens = 0
            ends.extend(chunks.ends for chunks in metadata.stores)
            return metadata

        scheduler.step = ahead
        while core.has_unfinished_requests():
            core.step()
        assert ends[0] == [BLOCK, 2 * BLOCK]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM's memory is not the host's, as far as the worker knows."""
    elsewhere = property(lambda self: SimpleNamespace(type="another"))
    monkeypatch.setattr(PagedMemory, "device", elsewhere)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_all_that_one_step_fills_is_staged_together(
    name: str, request: pytest.FixtureRequest, disk: dict[str, Any]
) -> None:
    prompts = [prompt(100, n) for n in range(12)]
    with engine(request.getfixturevalue(name), disk) as llm:
        plain = [tokens for tokens, _ in answers(llm, *prompts)]
        forget(llm)
        assert answers(llm, *prompts) == [(tokens, 96) for tokens in plain]


@pytest.mark.usefixtures("device")
def test_where_the_device_has_no_room_nothing_is_stored_and_vllm_goes_on(
    llama: Path, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PagedMemory, "staged", full)
    with engine(llama, disk) as llm:
        cold = answers(llm, prompt(100))
        forget(llm)
        assert answers(llm, prompt(100)) == [(cold[0][0], 0)]


def test_embeddings_that_need_the_whole_prompt_are_computed(
    llama: Path, disk: dict[str, Any], tmp_path: Path
) -> None:
    """VLLM's pooler raises where a part of the prompt was not computed."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from vllm import PoolingParams
    from vllm.config import PoolerConfig

    words = Tokenizer(WordLevel({str(n): n for n in range(512)}, unk_token="0"))
    model = shutil.copytree(llama, tmp_path / "llama")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="2")
    tokenizer.save_pretrained(model)

    def embedded(llm: Any) -> torch.Tensor:
        core = llm.llm_engine
        core.add_request("a", {"prompt_token_ids": prompt(300)}, PoolingParams(task="embed"))
        while not (outs := [out for out in core.step() if out.finished]):
            pass
        return outs[0].outputs.data

    for pooling, reuses in (("LAST", True), ("MEAN", False)):
        pooler = PoolerConfig(seq_pooling_type=pooling)
        options = {"runner": "pooling", "convert": "embed", "pooler_config": pooler}
        with engine(model, disk, skip_tokenizer_init=False, **options) as llm:
            assert (connector(llm)._scheduler is not None) == reuses
            first = embedded(llm)
            llm.reset_prefix_cache()
            assert torch.equal(embedded(llm), first)
