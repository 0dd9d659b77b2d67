"""What changes what a prompt's KV is: weights, adapters, requests of other kinds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lmcache_connectors.vllm import identity
from lmcache_connectors.vllm.adapters import Adapters
from lmcache_core import ConfigError
from tests.e2e.vllm.conftest import BLOCK, engine, saved
from tests.e2e.vllm.test_connector import GREEDY, answers, connector, flush, forget, prompt


def test_weights_that_are_loaded_anew_share_nothing_with_the_old_ones(
    llama: Path, disk: dict[str, Any]
) -> None:
    """vLLM itself goes on using its own prefix cache then; whoever changes weights resets it."""
    ids = prompt(200)
    with engine(llama, disk) as llm:
        answers(llm, ids)
        flush(llm)
        llm.collective_rpc("reload_weights")
        answers(llm, prompt(40, 9))  # a step, in which the scheduler hears of it
        forget(llm)
        assert answers(llm, ids)[0][1] == 0
        forget(llm)
        assert answers(llm, ids)[0][1] == 199 // BLOCK * BLOCK


def test_shared_kv_of_the_old_weights_is_neither_loaded_nor_added_to(
    llama: Path, disk: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Other engines go on with what was stored before."""
    ids, other, shared = prompt(200), prompt(200, 1), {**disk, "share_as": "tiny llama"}
    with engine(llama, shared) as llm:
        answers(llm, ids)
        flush(llm)
        llm.collective_rpc("reload_weights")
        answers(llm, prompt(40, 9))  # a step, in which the scheduler hears of it
        forget(llm)
        assert answers(llm, ids)[0][1] == 0
        answers(llm, other)
        forget(llm)
        assert answers(llm, ids)[0][1] == 199 // BLOCK * BLOCK
        flush(llm)
    assert "store failed" not in caplog.text
    with engine(llama, shared) as llm:
        assert answers(llm, other)[0][1] == 0
        assert answers(llm, ids)[0][1] == 199 // BLOCK * BLOCK


def test_a_directory_with_other_weights_is_another_model(
    llama: Path, disk: dict[str, Any], tmp_path: Path
) -> None:
    """Trained on, and saved over itself, within one process."""
    from transformers import AutoConfig

    folder = tmp_path / "trained"
    ids = prompt(200)
    for seed in (1, 2):
        saved(AutoConfig.from_pretrained(llama), folder, seed)
        with engine(folder, disk) as llm:
            assert answers(llm, ids)[0][1] == 0
            flush(llm)


def test_positions_for_long_prompts_are_not_those_for_short_ones(
    disk: dict[str, Any], tmp_path: Path
) -> None:
    """LongRoPE: vLLM takes the factors of the longest prompt that it would serve."""
    from transformers import Phi3Config

    rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16,
            "rope_theta": 10000.0, "original_max_position_embeddings": 512}  # fmt: skip
    config = Phi3Config(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, max_position_embeddings=1024, pad_token_id=0,
        original_max_position_embeddings=512, rope_parameters=rope,
    )  # fmt: skip
    model, ids = saved(config, tmp_path / "phi"), prompt(200)
    for longest, reused in ((512, 0), (1024, 0), (512, 199 // BLOCK * BLOCK)):
        with engine(model, disk, max_model_len=longest) as llm:
            assert answers(llm, ids)[0][1] == reused
            flush(llm)
    with (
        pytest.raises(Exception, match="share_as"),
        engine(model, {**disk, "share_as": "phi", "strict": True}),
    ):
        pass


def test_a_load_ordered_before_the_weights_changed_does_not_happen(
    llama: Path, disk: dict[str, Any]
) -> None:
    """The very next request was looked up before the scheduler heard of the change."""
    ids = prompt(200)
    with engine(llama, disk) as llm:
        cold = answers(llm, ids)[0][0]
        forget(llm)
        llm.collective_rpc("reload_weights")
        cache, told = connector(llm)._scheduler._cache.engine, []
        cache.load_gate.record_load = lambda *load: told.append(load)
        ((tokens, _),) = answers(llm, ids)
        assert tokens == cold
        assert ("loaded", "disk") not in cache.stats()
        assert not told  # nothing was read that could have paid


def test_sleep_and_pause_reset_the_cache(llama: Path, disk: dict[str, Any]) -> None:
    """vLLM's pause for new weights clears the connector's cache, too."""
    ids = prompt(200)
    with engine(llama, disk) as llm:
        answers(llm, ids)
        flush(llm)
        core = llm.llm_engine.engine_core.engine_core
        core._reset_caches()
        assert answers(llm, ids)[0][1] == 0


def lora(llama: Path, folder: Path, seed: int) -> Path:
    """An adapter of random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(llama)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_adapters_share_nothing_and_a_name_with_other_files_neither(
    llama: Path, disk: dict[str, Any], tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    one, two = lora(llama, tmp_path / "one", 1), lora(llama, tmp_path / "two", 2)
    place = tmp_path / "adapter"
    shutil.copytree(one, place)
    ids = prompt(200)
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}

    def ask(llm: Any, adapter: LoRARequest | None) -> tuple[list[int], int]:
        (out,) = llm.generate(
            [{"prompt_token_ids": ids}], GREEDY, lora_request=adapter, use_tqdm=False
        )
        return list(out.outputs[0].token_ids), out.num_cached_tokens

    with engine(llama, disk, **options) as llm:
        plain = ask(llm, None)[0]
        adapted = ask(llm, LoRARequest("a", 1, str(place)))
        assert adapted[1] == 0
        assert adapted[0] != plain
        forget(llm)
        assert ask(llm, LoRARequest("a", 1, str(place))) == (adapted[0], 199 // BLOCK * BLOCK)
        flush(llm)
        shutil.rmtree(place)
        shutil.copytree(two, place)
        forget(llm)  # vLLM still has the old one; that is nobody's to say who looks at files only
        assert ask(llm, LoRARequest("a", 1, str(place)))[1] == 0
        flush(llm)
    with engine(llama, disk, **options) as llm:
        other = ask(llm, LoRARequest("a", 1, str(place)))
        assert other[1] == 0
        assert other[0] != adapted[0]
        assert ask(llm, None) == (plain, 199 // BLOCK * BLOCK)


def test_files_that_changed_since_an_adapter_was_loaded_are_not_what_computes(
    llama: Path, disk: dict[str, Any], tmp_path: Path
) -> None:
    """A server loads adapters long before the first request that names them."""
    from vllm.lora.request import LoRARequest

    one, two = lora(llama, tmp_path / "one", 1), lora(llama, tmp_path / "two", 2)
    place, ids = tmp_path / "adapter", prompt(200)
    shutil.copytree(one, place)
    adapter = LoRARequest("a", 1, str(place))

    def ask(llm: Any) -> int:
        asked = [{"prompt_token_ids": ids}]
        (out,) = llm.generate(asked, GREEDY, lora_request=adapter, use_tqdm=False)
        flush(llm)
        return out.num_cached_tokens

    with engine(llama, disk, enable_lora=True, max_lora_rank=8) as llm:
        llm.llm_engine.add_lora(adapter)
        shutil.rmtree(place)
        shutil.copytree(two, place)
        ask(llm)
    with engine(llama, disk, enable_lora=True, max_lora_rank=8) as llm:
        assert ask(llm) == 0
    with engine(llama, disk, enable_lora=True, max_lora_rank=8) as llm:
        llm.llm_engine.add_lora(adapter)
        assert ask(llm) == 199 // BLOCK * BLOCK


def test_an_adapter_whose_files_cannot_be_told_is_computed(
    llama: Path, disk: dict[str, Any], tmp_path: Path
) -> None:
    """VLLM may have it, from a hub or in memory: what cannot be named is not stored."""
    from vllm.lora.request import LoRARequest

    place = lora(llama, tmp_path / "one", 1)
    (place / "gone").symlink_to("nowhere")
    assert Adapters().fingerprint(LoRARequest("a", 1, "somebody/adapter")) is None
    ids = prompt(200)
    with engine(llama, disk, enable_lora=True, max_lora_rank=8) as llm:
        for _ in range(2):
            adapter = LoRARequest("a", 1, str(place))
            (out,) = llm.generate(
                [{"prompt_token_ids": ids}], GREEDY, lora_request=adapter, use_tqdm=False
            )
            assert out.num_cached_tokens == 0
            forget(llm)


def test_prompts_whose_logprobs_are_asked_for_are_computed(
    llama: Path, disk: dict[str, Any]
) -> None:
    from vllm import SamplingParams

    ids = prompt(200)
    with engine(llama, disk) as llm:
        answers(llm, ids)
        forget(llm)
        params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1, detokenize=False)
        (out,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        assert out.num_cached_tokens == 0
        assert len(out.prompt_logprobs) == 200


def test_any_part_of_the_weights_tells_them_apart(tmp_path: Path) -> None:
    """A fine-tuned copy may differ in a few tensors only, with the same names and sizes."""
    file = tmp_path / "model.safetensors"
    seen = set()
    for place in [None, 0, 3_300_000, 7_200_000]:
        data = bytearray(8 << 20)
        if place is not None:
            data[place : place + (1 << 20)] = b"\1" * (1 << 20)
        file.write_bytes(data)
        seen.add(identity._files(tmp_path))
    assert len(seen) == 4
    file.unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no weights"):
        identity._files(tmp_path)
