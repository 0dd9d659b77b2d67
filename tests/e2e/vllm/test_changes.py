"""What changes what a prompt's KV is: weights, adapters, requests of other kinds."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.vllm.conftest import BLOCK, engine, saved
from tests.e2e.vllm.test_connector import (
    GREEDY,
    answers,
    connector,
    flush,
    forget,
    prompt,
)

WHOLE = 199 // BLOCK * BLOCK
"""What of 200 tokens can be reused."""


def ask(llm: Any, ids: list[int], adapter: Any = None) -> tuple[list[int], int]:
    """(tokens, how many of the prompt's were not computed)."""
    asked = [{"prompt_token_ids": ids}]
    (out,) = llm.generate(asked, GREEDY, lora_request=adapter, use_tqdm=False)
    return list(out.outputs[0].token_ids), out.num_cached_tokens


def known_as(llm: Any) -> str:
    """What the scheduler knows of the weights."""
    scheduler = connector(llm)._scheduler
    scheduler._look()
    return scheduler._weights


def changed(config: Any, fields: dict[str, Any]) -> Any:
    config.update(fields)
    return config


def moved(name: str, kept: list[Any] | None = None) -> Any:
    """Adds to the last value of a part of the model, as workers' extensions do it: torch counts no
    version of that. `kept` gets what puts it back."""

    def write(model: Any) -> None:
        part, _, key = name.rpartition(".")
        module = model.get_submodule(part)
        held = getattr(module, key)
        if isinstance(held, float):
            setattr(module, key, held + 0.5)
            back = partial(setattr, module, key, held)
        else:
            back = partial(held.data.copy_, held.data.clone())
            held.data.view(-1)[-1:].add_(0.5)
        if kept is not None:
            kept.append(back)

    return write


def test_what_is_computed_is_known_by_content_in_every_process_and_place(
    llama: Path, disk: dict[str, Any], tmp_path: Path
) -> None:
    """A path, its spelling, a link, a name, how much is served: none is part of it."""
    ids, seen = prompt(200), {}
    with engine(llama, disk) as llm:
        cold = ask(llm, ids)
        seen["as it is"] = known_as(llm)
        flush(llm)
    shutil.copytree(llama, tmp_path / "copy")
    (tmp_path / "link").symlink_to(llama)
    named = {"served_model_name": "another", "max_num_seqs": 3, "kv_cache_memory_bytes": 20 << 20,
             "max_model_len": 600, "max_num_batched_tokens": 700, "enable_lora": True}  # fmt: skip
    for path, options in ((f"{tmp_path}/./copy/", {}), (tmp_path / "link", named)):
        with engine(path, disk, **options) as llm:
            assert known_as(llm) == seen["as it is"]
            assert ask(llm, ids) == (cold[0], WHOLE)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    for overrides in ({"rms_norm_eps": 0.1}, rope):
        with engine(llama, disk, hf_overrides=overrides) as llm:
            assert known_as(llm) != seen["as it is"]
            assert ask(llm, ids)[1] == 0
            flush(llm)
        with engine(llama, disk, hf_overrides=partial(changed, fields=overrides)) as llm:
            assert ask(llm, ids)[1] == WHOLE  # said in another way, the same


def test_weights_are_observed_whatever_changes_them_and_found_again_when_they_are_back(
    llama: Path, disk: dict[str, Any]
) -> None:
    """By a worker's method or somebody's own; one value of a norm, of the embeddings, a number that
    a module holds. vLLM's own cache has nothing of the old ones either."""
    ids = prompt(200)
    with engine(llama, disk) as llm:
        cold, first = ask(llm, ids)[0], known_as(llm)
        seen, kept = {first}, list[Any]()
        for name in (
            "model.layers.1.input_layernorm.weight",
            "model.embed_tokens.weight",
            "model.layers.0.self_attn.rotary_emb.cos_sin_cache",
            "model.layers.1.input_layernorm.variance_epsilon",
        ):
            llm.apply_model(moved(name, kept))
            assert ask(llm, ids)[1] == 0, name
            flush(llm)
            seen.add(known_as(llm))
            forget(llm)
            assert ask(llm, ids)[1] == WHOLE, name  # its own
        assert len(seen) == 5
        llm.apply_model(lambda model: [back() for back in kept])
        assert known_as(llm) == first
        llm.collective_rpc("reload_weights")
        assert known_as(llm) == first
        assert ask(llm, ids) == (cold, WHOLE)
        llm.collective_rpc("check_health")  # may be anything; what is the same is the same
        assert known_as(llm) == first


def test_weights_that_the_cpus_library_keeps_are_known_too(llama: Path, tmp_path: Path) -> None:
    """On a CPU vLLM packs most matrices into memory that no tensor shows."""
    from safetensors.torch import load_file, save_file

    seen = []
    for name in (None, "self_attn.v_proj", "mlp.down_proj"):
        folder = tmp_path / str(name)
        shutil.copytree(llama, folder)
        tensors = load_file(folder / "model.safetensors")
        if name:
            tensors[f"model.layers.1.{name}.weight"][3, 5] += 1.0
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        kv = {"chunk_size": BLOCK, "tiers": [{"backend": "local_cpu", "capacity": "8MiB"}]}
        with engine(folder, kv) as llm:
            seen.append(known_as(llm))
    assert len(set(seen)) == 3


def test_blocks_that_were_computed_while_weights_changed_are_never_stored(
    llama: Path, disk: dict[str, Any]
) -> None:
    """vLLM goes on with a request whose first tokens the old weights computed, and keeps its blocks
    for others."""
    from vllm import SamplingParams

    ids, more = prompt(200), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with engine(llama, disk) as llm:
        core = llm.llm_engine
        core.add_request("runs", {"prompt_token_ids": ids}, more)
        for _ in range(3):
            core.step()
        llm.apply_model(moved("model.embed_tokens.weight"))
        core.add_request("new", {"prompt_token_ids": [*ids, *prompt(40, 1)]}, GREEDY)
        outs = {}
        while core.has_unfinished_requests():
            outs.update((out.request_id, out) for out in core.step())
        said = [*ids, *outs["runs"].outputs[0].token_ids]
        forget(llm)
        assert ask(llm, [*said, 7])[1] == 192  # all that "new", which was computed whole, has of it
        forget(llm)
        assert ask(llm, [*ids, *prompt(40, 1)])[1] == 224
        answer = ask(llm, [*ids, *prompt(40, 1)])[0]
    with engine(llama, {**disk, "tiers": [{"backend": "local_cpu", "capacity": "8MiB"}]}) as llm:
        llm.apply_model(moved("model.embed_tokens.weight"))
        assert ask(llm, [*ids, *prompt(40, 1)])[0] == answer


def test_shared_kv_of_the_first_weights_is_neither_loaded_nor_added_to_by_others(
    llama: Path, disk: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Other engines go on with what was stored before."""
    ids, other, shared = prompt(200), prompt(200, 1), {**disk, "share_as": "tiny llama"}
    with engine(llama, shared) as llm:
        ask(llm, ids)
        flush(llm)
        llm.apply_model(moved("model.embed_tokens.weight"))
        assert ask(llm, ids)[1] == 0
        ask(llm, other)
        forget(llm)
        assert ask(llm, ids)[1] == WHOLE
        flush(llm)
    assert "store failed" not in caplog.text
    with engine(llama, shared) as llm:
        assert ask(llm, other)[1] == 0
        assert ask(llm, ids)[1] == WHOLE


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


def test_a_reset_looks_again_and_finds_what_still_belongs(
    llama: Path, disk: dict[str, Any]
) -> None:
    """vLLM resets the connector when it sleeps and pauses, and for who wrote to weights past it."""
    ids = prompt(200)
    with engine(llama, disk) as llm:
        cold = ask(llm, ids)[0]
        flush(llm)
        core = llm.llm_engine.engine_core.engine_core
        core._reset_caches()
        assert ask(llm, ids) == (cold, WHOLE)
        model = core.model_executor.driver_worker.worker.get_model()
        moved("model.embed_tokens.weight")(model)
        assert llm.reset_prefix_cache(reset_connector=True)
        assert ask(llm, ids)[1] == 0


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


def test_adapters_are_known_by_the_bytes_that_are_loaded(
    llama: Path, disk: dict[str, Any], tmp_path: Path
) -> None:
    """Not by name, path, size or time; again when they are loaded again; as they were, found."""
    from vllm.lora.request import LoRARequest

    one, two = lora(llama, tmp_path / "one", 1), lora(llama, tmp_path / "two", 2)
    for folder in (one, two):  # as of an archive, or an image
        for file in folder.iterdir():
            os.utime(file, (0, 0))
    place, ids = tmp_path / "adapter", prompt(200)
    adapter = LoRARequest("a", 1, str(place))
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}

    def put(folder: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)

    put(one)
    with engine(llama, disk, **options) as llm:
        plain = ask(llm, ids)
        first = ask(llm, ids, adapter)
        assert (first[1], first[0] != plain[0]) == (0, True)
        forget(llm)
        assert ask(llm, ids, adapter) == (first[0], WHOLE)
        put(two)
        forget(llm)  # vLLM still has the old one, and it is what computes
        assert ask(llm, ids, adapter) == (first[0], WHOLE)
        again = LoRARequest("a", 1, str(place), load_inplace=True)
        second = ask(llm, ids, again)  # vLLM's own cache would have taken it for the first
        assert (second[1], second[0] != first[0]) == (0, True)
        forget(llm)
        assert ask(llm, ids, adapter) == (second[0], WHOLE)
        put(one)
        llm.llm_engine.add_lora(again)
        forget(llm)
        assert ask(llm, ids, adapter) == (first[0], WHOLE)
        flush(llm)
    put(two)
    with engine(llama, disk, **options) as llm:
        llm.llm_engine.add_lora(adapter)
        put(one)  # which is not what was loaded
        assert ask(llm, ids, adapter) == (second[0], WHOLE)
        assert ask(llm, ids, LoRARequest("a", 7, str(place))) == (first[0], WHOLE)
        assert ask(llm, ids) == (plain[0], WHOLE)
    with engine(llama, disk) as llm:  # without adapters, the same model
        assert ask(llm, ids) == (plain[0], WHOLE)


def test_an_adapter_that_was_replaced_behind_our_back_is_neither_loaded_nor_stored(
    llama: Path, disk: dict[str, Any], tmp_path: Path
) -> None:
    """vLLM drops adapters that it has no room for, and reads their files again."""
    from vllm.lora.request import LoRARequest

    place, ids, other = lora(llama, tmp_path / "one", 1), prompt(200), prompt(200, 1)
    two = lora(llama, tmp_path / "two", 2)
    adapter = LoRARequest("a", 1, str(place))
    with engine(llama, disk, enable_lora=True, max_lora_rank=8) as llm:
        first = ask(llm, ids, adapter)[0]
        flush(llm)
        shutil.rmtree(place)
        shutil.copytree(two, place)
        held = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        held.model_runner.lora_manager.remove_all_adapters()
        forget(llm)
        second = ask(llm, ids, adapter)  # what was found is another adapter's, and not taken
        assert (second[1], second[0] != first) == (0, True)
        ask(llm, other, adapter)
        assert ask(llm, ids, adapter)[1] == 0  # nor was it stored: it was taken for the first
        forget(llm)
        assert ask(llm, ids, adapter) == (second[0], WHOLE)
        flush(llm)
    with engine(llama, disk, enable_lora=True, max_lora_rank=8) as llm:
        assert ask(llm, ids, adapter) == (second[0], WHOLE)
        assert ask(llm, other, adapter)[1] == WHOLE


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
