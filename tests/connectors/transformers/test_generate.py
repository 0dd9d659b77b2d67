"""The Transformers connector: the same tokens as without it, from less work."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import lmcache_core
from lmcache_connectors.transformers import attach, detach
from lmcache_connectors.transformers import attached as attached_module
from lmcache_connectors.transformers.guards import Guards
from lmcache_connectors.transformers.identity import Observer
from lmcache_connectors.transformers.layers import WithRoom
from lmcache_connectors.transformers.shape import Layers, Shape
from lmcache_connectors.transformers.trial import Trial
from lmcache_connectors.transformers.walk import Walk
from lmcache_core import CacheEngine, ConfigError
from lmcache_core.backend import component

SIZE = 8
VOCABULARY = 128
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
}  # fmt: skip
WINDOW = {"sliding_window": 12}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_positions": 512}),
    "mistral": ("MistralConfig", "MistralForCausalLM", WINDOW),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**WINDOW, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", MLA),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str, dtype: str = "float32", **changes: Any) -> Any:
    """A tiny model with random weights, the same every time."""
    config, model, more = FAMILIES[family]
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**{**COMMON, **more, **changes})
    return getattr(transformers, model)(settings).to(DTYPES[dtype]).eval()


def config(path: Path | None = None) -> dict[str, Any]:
    tiers = [{"backend": "local_cpu", "capacity": "64MiB"}]
    if path is not None:
        tiers.append({"backend": "disk", "path": str(path), "capacity": "64MiB"})
    return {"chunk_size": SIZE, "tiers": tiers}


@pytest.fixture
def cache() -> Iterator[CacheEngine]:
    with lmcache_core.open(config()) as engine:
        yield engine


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def greedy(model: Any, ids: torch.Tensor, new: int = 16, **more: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=new, do_sample=False, **more)


class Computed(logging.Handler):
    """Counts the columns that the model computes: what reuse is to save.

    Through a logger: a forward that reaches what it changes itself is another one at every call.
    """

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.columns: list[int] = []
        forward = type(model).forward
        log = logging.Logger("computed")
        log.addHandler(self)

        def counting(this: Any, *args: Any, **kwargs: Any) -> Any:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            log.info("columns", extra={"columns": ids.shape[1]})
            return forward(this, *args, **kwargs)

        counting.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(type(model), "forward", counting)

    def emit(self, record: logging.LogRecord) -> None:
        self.columns.append(record.columns)  # type: ignore[attr-defined]

    def prefill(self) -> int:
        """Columns of the first forward pass since the last call."""
        first = self.columns[0]
        self.columns.clear()
        return first


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Computed]:
    return lambda model: Computed(model, monkeypatch)


def loaded(cache: CacheEngine) -> int:
    return sum(n for event, n in cache.stats().items() if event[0] == "loaded")


# Every family


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_in_fp32_is_what_it_is_without_a_cache(
    family: str, cache: CacheEngine, computed: Any
) -> None:
    model = build(family)
    one, two = tokens(1, 50), torch.cat([tokens(1, 40), tokens(1, 13, seed=1)], dim=1)
    expected = greedy(model, one), greedy(model, two)
    counter = computed(model)
    with attach(model, cache):
        counter.columns.clear()
        assert torch.equal(greedy(model, one), expected[0])
        assert counter.prefill() == 50
        assert torch.equal(greedy(model, two), expected[1])
        assert counter.prefill() == 53 - 40
        assert torch.equal(greedy(model, one), expected[0])
        assert counter.prefill() == 50 - 48


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_bit_for_bit_what_was_computed(
    family: str, dtype: str, tmp_path: Path
) -> None:
    """And the output is that of the same split prefill without our storage."""
    model = build(family, dtype)
    ids = tokens(1, 50)
    with lmcache_core.open(config(tmp_path)) as cache, attach(model, cache) as attached:
        greedy(model, ids, 2)
        fresh, n = attached.load_prefix(ids)
        assert n == 48
    with lmcache_core.open(config(tmp_path)) as cache, attach(model, cache) as attached:
        restored, n = attached.load_prefix(ids)
        assert n == 48
        output = greedy(model, ids)
        assert cache.stats()["loaded", "disk"] == 6
    own = split(model, ids, 48)
    for layer in range(4):
        for a, b, c in zip(kv(fresh, layer), kv(restored, layer), kv(own, layer), strict=True):
            assert a.shape == c.shape
            assert torch.equal(a, b)
            # Computed in one pass of 50 there and of 48 here: equal up to rounding.
            torch.testing.assert_close(a.float(), c.float(), atol=0.05, rtol=0.05)
    replay = greedy(model, ids, **{argument(model): copy_of(model, restored)})
    assert torch.equal(output, replay)


def argument(model: Any) -> str:
    names = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def kv(cache: DynamicCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.layers[layer].keys, cache.layers[layer].values


def split(model: Any, ids: torch.Tensor, n: int) -> DynamicCache:
    """The first n tokens' KV by Transformers alone."""
    own = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :n], use_cache=True, **{argument(model): own})
    return own


def copy_of(model: Any, cache: DynamicCache) -> DynamicCache:
    """The same KV through Transformers' own `update`, as far as that can."""
    own = DynamicCache(config=model.config)
    for layer, source in zip(own.layers, cache.layers, strict=True):
        layer.update(source.keys.clone(), source.values.clone())
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = source.cumulative_length
    return own


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_stores_generated_tokens_too(
    family: str, cache: CacheEngine, computed: Any
) -> None:
    model = build(family)
    first = greedy(model, tokens(1, 20), 30)
    follow_up = torch.cat([first, tokens(1, 9, seed=2)], dim=1)
    expected = greedy(model, follow_up)
    counter = computed(model)
    with attach(model, cache):
        greedy(model, tokens(1, 20), 30)
        counter.columns.clear()
        assert torch.equal(greedy(model, follow_up), expected)
        width = follow_up.shape[1]
        assert counter.prefill() == width - (first.shape[1] - 1) // SIZE * SIZE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_with_left_padding_reuses_what_all_rows_have(
    family: str, cache: CacheEngine, computed: Any
) -> None:
    model = build(family)
    document = tokens(1, 40)
    ids = torch.cat([document.expand(3, -1), tokens(3, 12, seed=3)], dim=1)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 7, 13)):  # shift right: the row's end falls off
        ids[row] = torch.cat([torch.zeros(pad, dtype=torch.long), ids[row, : 52 - pad]])
        mask[row, :pad] = 0
    expected = greedy(model, ids, attention_mask=mask)
    counter = computed(model)
    with attach(model, cache):
        counter.columns.clear()
        assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
        assert counter.prefill() == 52
        assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
        assert counter.prefill() == 52 - min(48, 7 + 40, 13 + 32)
        # Rows are stored without their padding, so each is of use alone.
        alone = ids[1:2, 7:]
        greedy(model, alone)
        assert counter.prefill() == 45 - 40


# One family is enough for the rest


@pytest.fixture
def model() -> Any:
    return build("llama")


def test_several_answers_to_one_prompt(model: Any, cache: CacheEngine, computed: Any) -> None:
    def sampled() -> torch.Tensor:
        torch.manual_seed(5)
        return model.generate(
            tokens(2, 30), max_new_tokens=12, do_sample=True, num_return_sequences=3
        )

    expected = sampled()
    counter = computed(model)
    with attach(model, cache):
        sampled()
        counter.columns.clear()
        assert torch.equal(sampled(), expected)
        assert counter.prefill() == 30 - 24


def test_nothing_is_stored_past_a_rows_end(model: Any, cache: CacheEngine) -> None:
    ids = tokens(2, 16)
    answers = greedy(model, ids, 30)
    eos = int(answers[0, 20])  # row 0 ends there, row 1 goes on
    with attach(model, cache) as attached:
        out = greedy(model, ids, 30, eos_token_id=eos, pad_token_id=0)
        row = out[0]
        end = 16 + int((row[16:] == eos).nonzero()[0]) + 1
        probe = torch.cat([row, row.new_zeros(8)])[None]
        assert attached.load_prefix(probe)[1] == end // SIZE * SIZE


def test_a_prompt_is_never_reused_whole(model: Any, cache: CacheEngine, computed: Any) -> None:
    ids = tokens(1, 48)
    expected = greedy(model, ids)
    counter = computed(model)
    with attach(model, cache):
        greedy(model, ids)
        counter.columns.clear()
        assert torch.equal(greedy(model, ids), expected)
        assert counter.prefill() == 8


def test_prompts_shorter_than_a_chunk_and_one_token(model: Any, cache: CacheEngine) -> None:
    for width in (1, 2, 7, 8, 9):
        expected = greedy(model, tokens(1, width), 2)
        with attach(model, cache):
            for _ in range(2):
                assert torch.equal(greedy(model, tokens(1, width), 2), expected)


def test_return_dict_streamer_and_scores_are_untouched(model: Any, cache: CacheEngine) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.view(-1).tolist())

        def end(self) -> None:
            self.got.append([])

    def run() -> tuple[Any, Streamer]:
        streamer = Streamer()
        out = greedy(
            model, tokens(1, 30), 6, streamer=streamer, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        return out, streamer

    plain, heard = run()
    with attach(model, cache):
        for _ in range(2):
            out, streamer = run()
            assert torch.equal(out.sequences, plain.sequences)
            assert streamer.got == heard.got
            for a, b in zip(out.scores, plain.scores, strict=True):
                torch.testing.assert_close(a, b)
            returned = out[argument(model)]
            assert returned.get_seq_length() == 35
            assert {type(layer) for layer in returned.layers} == {DynamicLayer}


def test_two_tenants_share_nothing(model: Any, cache: CacheEngine) -> None:
    for tenant in ("a", "b", ""):
        with attach(model, cache, tenant=tenant):
            greedy(model, tokens(1, 30))
    assert loaded(cache) == 0
    with attach(model, cache, tenant="a"):
        greedy(model, tokens(1, 30))
    assert loaded(cache) == 3


def test_other_weights_under_one_name_share_nothing(cache: CacheEngine) -> None:
    model, other = build("llama"), build("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight[0, 0] += 1e-3
    for m in (model, other):
        with attach(m, cache):
            greedy(m, tokens(1, 30))
    assert loaded(cache) == 0


def test_other_positions_dtype_or_attention_share_nothing(cache: CacheEngine) -> None:
    models = [
        build("llama"),
        build("llama", "bfloat16"),
        build("llama", attn_implementation="eager"),
        build("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        build("llama", rms_norm_eps=1e-3),
    ]
    for m in models:
        with attach(m, cache):
            greedy(m, tokens(1, 30))
    assert loaded(cache) == 0


def test_a_shared_name_is_one_models_while_its_weights_stay(cache: CacheEngine) -> None:
    """`share_as` is the caller's word for the weights that were attached, and for no others."""
    model, same, other = build("llama"), build("llama"), build("llama")
    ids = tokens(1, 30)
    with attach(model, cache, share_as="a"):
        greedy(model, ids)
    with attach(other, cache, share_as="b"):
        greedy(other, ids)
    with attach(same, cache):
        greedy(same, ids)
    assert loaded(cache) == 0
    with attach(same, cache, share_as="a"):
        greedy(same, ids)
        assert loaded(cache) == 3
        with torch.no_grad():
            same.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        changed = greedy(same, ids)
        assert loaded(cache) == 3
    assert torch.equal(changed, greedy(same, ids))
    with pytest.raises(ValueError, match="share_as"):
        attach(model, cache, tenant="t", share_as="a")


def test_weights_that_change_while_attached_are_noticed(model: Any, cache: CacheEngine) -> None:
    ids = tokens(1, 30)
    with attach(model, cache):
        greedy(model, ids)
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
        changed = greedy(model, ids)
        assert loaded(cache) == 0
        model.load_state_dict(build("llama").state_dict())
        back = greedy(model, ids)
        assert loaded(cache) == 3  # the old weights, found again by what they are
        model.to(torch.bfloat16)
        greedy(model, ids)
        assert loaded(cache) == 3
    assert torch.equal(back, greedy(build("llama"), ids))
    assert changed.shape[0] == 1


def test_attention_and_config_that_change_while_attached_are_noticed(
    model: Any, cache: CacheEngine
) -> None:
    with attach(model, cache):
        greedy(model, IDS)
        model.set_attn_implementation("eager")
        greedy(model, IDS)
        model.config.rms_norm_eps = 1e-3
        greedy(model, IDS)
        assert loaded(cache) == 0
        greedy(model, IDS)
        assert loaded(cache) == 3


def test_it_works_again_after_a_restart(tmp_path: Path, computed: Any) -> None:
    ids = tokens(1, 50)
    model = build("llama")
    counter = computed(model)
    with lmcache_core.open(config(tmp_path)) as cache, attach(model, cache):
        expected = greedy(model, ids)
    again = build("llama")
    with lmcache_core.open(config(tmp_path)) as cache, attach(again, cache):
        counter.columns.clear()
        assert torch.equal(greedy(again, ids), expected)
        assert counter.prefill() == 2


def test_damage_costs_time_and_never_tokens(tmp_path: Path, computed: Any) -> None:
    ids = tokens(1, 50)
    model = build("gemma3")
    with lmcache_core.open(config(tmp_path)) as cache, attach(model, cache):
        expected = greedy(model, ids)
    for number, file in enumerate(sorted(tmp_path.glob("chunks/*/*"))):
        if number % 3 == 0:
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
    with lmcache_core.open(config(tmp_path)) as cache, attach(model, cache):
        assert torch.equal(greedy(model, ids), expected)
        assert torch.equal(greedy(model, ids), expected)


def test_threads_share_an_attached_model(cache: CacheEngine) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = build("gemma3")
    prompts = [torch.cat([tokens(1, 30), tokens(1, 10, seed=n)], dim=1) for n in range(6)]
    expected = [greedy(model, ids) for ids in prompts]
    with attach(model, cache), ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            got = list(pool.map(lambda ids: greedy(model, ids), prompts))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_any_call_gives_what_it_gives_without_us(family: str, cache: CacheEngine) -> None:
    """Random calls on prompts that share beginnings, each compared with the plain model's."""
    model = build(family)
    chance = random.Random(7)
    document = tokens(1, 60)
    attached = attach(model, cache)
    for _ in range(40):
        call = random_call(chance, document)
        torch.manual_seed(1)
        got = model.generate(**call)
        attached.detach()
        torch.manual_seed(1)
        expected = model.generate(**call)
        attached = attach(model, cache)
        assert torch.equal(got, expected)
    attached.detach()
    assert loaded(cache) > 100


def random_call(chance: random.Random, document: torch.Tensor) -> dict[str, Any]:
    rows = chance.choice([1, 1, 1, 2, 3])
    shared = chance.randrange(60)
    ends = tokens(rows, chance.randrange(1, 14), seed=chance.randrange(3))
    ids = torch.cat([document[:, :shared].expand(rows, -1), ends], dim=1)
    mask = torch.ones_like(ids)
    if rows > 1:
        for row in range(rows):
            pad = chance.choice([0, 0, chance.randrange(ids.shape[1])])
            ids[row] = torch.cat(
                [torch.zeros(pad, dtype=torch.long), ids[row, : len(ids[row]) - pad]]
            )
            mask[row, :pad] = 0
    call: dict[str, Any] = {
        "inputs" if chance.random() < 0.2 else "input_ids": ids,
        "max_new_tokens": chance.randrange(1, 20),
        "do_sample": chance.random() < 0.4,
        "attention_mask": mask.bool() if chance.random() < 0.1 else mask,
    }
    if chance.random() < 0.2:
        call["num_return_sequences"] = 2
        call["do_sample"] = True
    if chance.random() < 0.2:
        call["repetition_penalty"] = 1.3
    if chance.random() < 0.2:
        call["generation_config"] = transformers.GenerationConfig(
            pad_token_id=0, eos_token_id=[2, 5, 17, 40], min_new_tokens=2
        )
    return call


# Driving the forward pass oneself


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
def test_the_explicit_form(family: str, cache: CacheEngine) -> None:
    model = build(family)
    ids = tokens(1, 50)
    name = argument(model)
    with attach(model, cache) as attached, torch.no_grad():
        prefix, n = attached.load_prefix(ids)
        assert n == 0
        plain = model(input_ids=ids, use_cache=True, **{name: prefix}).logits
        assert attached.store(ids, prefix) == 6
        again, n = attached.load_prefix(ids)
        assert n == 48
        logits = model(input_ids=ids[:, n:], use_cache=True, **{name: again}).logits
        torch.testing.assert_close(logits, plain[:, n:])
        assert attached.store(ids, again) == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prefix_may_be_copied_cropped_and_used_twice(family: str, cache: CacheEngine) -> None:
    """As people do who ask several questions about one document by hand."""
    model = build(family)
    ids = tokens(1, 20)
    questions = [torch.cat([ids, tokens(1, 9, seed=n)], dim=1) for n in range(3)]
    name = argument(model)
    expected = [greedy(model, q) for q in questions]
    with attach(model, cache) as attached:
        greedy(model, ids)
        prefix, n = attached.load_prefix(questions[0])
        assert n == 16
        before = [layer.keys.clone() for layer in prefix.layers]
    for question, tokens_ in zip(questions, expected, strict=True):
        own = copy.deepcopy(prefix)
        assert torch.equal(greedy(model, question, **{name: own}), tokens_)
        assert prefix.get_seq_length() == 16
        assert own.get_seq_length() == 29 + 15
    if family == "llama":  # a sliding layer cannot be cropped past its window
        prefix.crop(-4)
        assert torch.equal(greedy(model, questions[2], **{name: prefix}), expected[2])
    assert all(
        torch.equal(a[:, :, :12], layer.keys[:, :, :12])
        for a, layer in zip(before, prefix.layers, strict=True)
        if type(layer) is DynamicLayer
    )


def test_a_foreign_cache_can_be_stored_unless_its_window_moved_on(
    cache: CacheEngine, caplog: pytest.LogCaptureFixture
) -> None:
    for family, stored in (("llama", 6), ("mistral", 0)):
        model = build(family)
        own = split(model, tokens(1, 48), 48)
        with attach(model, cache) as attached:
            assert attached.store(tokens(1, 48), own) == stored
    assert "a sliding window that has moved on" in caplog.text


@pytest.mark.parametrize("value", ["dynamic", "hybrid"])
def test_the_dynamic_cache_may_be_asked_for_by_name(
    model: Any, cache: CacheEngine, value: str
) -> None:
    """Checkpoints of models with sliding windows say "hybrid", which generate takes for it."""
    expected = greedy(model, IDS)
    with attach(model, cache):
        assert torch.equal(greedy(model, IDS, cache_implementation=value), expected)
        model.generation_config.cache_implementation = value
        assert torch.equal(greedy(model, IDS), expected)
    assert loaded(cache) == 3


# What is passed through


def passes_through(
    model: Any, cache: CacheEngine, caplog: pytest.LogCaptureFixture, run: Callable[[], Any]
) -> str:
    """Checks that `run` gives the same with us and without; returns the log."""

    def ids(output: Any) -> torch.Tensor:
        return output if isinstance(output, torch.Tensor) else output.sequences

    torch.manual_seed(3)
    expected = ids(run())
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lmcache_core"), attach(model, cache):
        for _ in range(2):
            torch.manual_seed(3)
            assert torch.equal(ids(run()), expected)
    assert not any(event[0] in ("stored", "loaded") for event in cache.stats())
    lines = [r.message for r in caplog.records if r.name == "lmcache_core"]
    assert len(lines) == 1  # said once
    return lines[0]


IDS = tokens(1, 30)
CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "beams": (lambda m: greedy(m, IDS, num_beams=2), "beam search"),
    "static": (lambda m: greedy(m, IDS, cache_implementation="static"), "static cache"),
    "no cache": (lambda m: greedy(m, IDS, use_cache=False), "use_cache=False"),
    "embeddings": (
        lambda m: m.generate(
            inputs_embeds=m.get_input_embeddings()(IDS), max_new_tokens=4, do_sample=False
        ),
        "inputs_embeds",
    ),
    "own cache": (
        lambda m: greedy(m, IDS, **{argument(m): DynamicCache(config=m.config)}),
        "a cache of the caller's own",
    ),
    "prompt lookup": (lambda m: greedy(m, IDS, prompt_lookup_num_tokens=2), "prompt lookup"),
    "assistant": (lambda m: greedy(m, IDS, assistant_model=build("qwen3")), "assisted generation"),
    "positions": (
        lambda m: greedy(m, IDS, position_ids=torch.arange(5, 35)[None]),
        "the argument position_ids",
    ),
    "right padding": (
        lambda m: greedy(m, IDS, attention_mask=(torch.arange(30) < 25).long()[None]),
        "padding that is not on the left",
    ),
    "pads and no mask": (
        lambda m: greedy(m, torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], 1)),
        "no attention_mask",
    ),
    "hidden states": (
        lambda m: greedy(m, IDS, return_dict_in_generate=True, output_hidden_states=True),
        "output_hidden_states",
    ),
    "chunked prefill": (lambda m: greedy(m, IDS, prefill_chunk_size=8), "a prefill in chunks"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_a_call_that_cannot_be_served_runs_as_without_us(
    model: Any, cache: CacheEngine, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    call, reason = CALLS[name]
    assert reason in passes_through(model, cache, caplog, lambda: call(model))


def other(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def mamba() -> Any:
    return other("MambaForCausalLM", transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0,
        eos_token_id=2))  # fmt: skip


def hybrid() -> Any:
    return other("Lfm2ForCausalLM", transformers.Lfm2Config(
        **COMMON, layer_types=["conv", "full_attention"] * 2))  # fmt: skip


def encoder_decoder() -> Any:
    return other("T5ForConditionalGeneration", transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8,
        decoder_start_token_id=0))  # fmt: skip


def longrope() -> Any:
    return build("phi3", rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4, "factor": 8.0, "original_max_position_embeddings": 64})  # fmt: skip


def vision() -> Any:
    """Its positions continue those of the last call with an image."""
    text = {**COMMON, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2],
            "rope_theta": 1e4}}  # fmt: skip
    model = other("Qwen2VLForConditionalGeneration", transformers.Qwen2VLConfig(
        text_config=text, image_token_id=120, video_token_id=121, vision_start_token_id=122,
        vision_end_token_id=123,
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}))  # fmt: skip
    model.generation_config.pad_token_id = 0
    return model


def xlm() -> Any:
    return other("XLMWithLMHeadModel", transformers.XLMConfig(
        vocab_size=VOCABULARY, emb_dim=32, n_layers=2, n_heads=4, causal=True, use_lang_emb=False,
        mask_token_id=3, pad_token_id=0, eos_token_id=2))  # fmt: skip


def both_directions() -> Any:
    return other("BertLMHeadModel", transformers.BertConfig(**COMMON))


def hooked() -> Any:
    model = build("llama")
    model.model.layers[0].register_forward_hook(lambda module, args, out: out)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (mamba, "not indexed by token"),
        (hybrid, "not indexed by token"),
        (encoder_decoder, "an encoder-decoder model"),
        (longrope, "depends on the prompt's length"),
        (vision, "positions depend on earlier calls"),
        (hooked, "a forward hook"),
        (xlm, "does not go on from a cache"),
        (both_directions, "attention to later tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_cached_generates_as_without_us(
    make: Callable[[], Any], reason: str, cache: CacheEngine, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    assert reason in passes_through(model, cache, caplog, lambda: greedy(model, IDS, 6))


def test_padding_where_positions_are_columns(
    cache: CacheEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A decoder that takes no position_ids is served without padding only."""
    model = other("TrOCRForCausalLM", transformers.TrOCRConfig(
        vocab_size=VOCABULARY, d_model=32, decoder_layers=2, decoder_attention_heads=4,
        decoder_ffn_dim=48, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1))  # fmt: skip
    ids = tokens(2, 30)
    ids[0, :5] = 0
    mask = (ids != 0).long()
    reason = passes_through(
        model, cache, caplog, lambda: greedy(model, ids, attention_mask=mask, eos_token_id=None)
    )
    assert "takes no position_ids" in reason
    with attach(model, cache):
        for _ in range(2):
            greedy(model, ids[1:])
    assert loaded(cache) == 3


def test_token_types_run_as_without_us(
    cache: CacheEngine, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("gpt2")
    types = torch.ones_like(IDS)
    reason = passes_through(model, cache, caplog, lambda: greedy(model, IDS, token_type_ids=types))
    assert "the argument token_type_ids" in reason


def test_hidden_states_once_asked_for_do_not_end_reuse(model: Any, cache: CacheEngine) -> None:
    """Transformers leaves its collecting hooks in the model."""
    with attach(model, cache):
        greedy(model, IDS, return_dict_in_generate=True, output_hidden_states=True)
        greedy(model, IDS)
        greedy(model, IDS)
    assert loaded(cache) == 3


STEPS: list[tuple[Any, str, tuple[str, ...]]] = [
    (attached_module, "Call", ("miss", "hit")),
    (attached_module, "pads_of", ("miss", "hit")),
    (attached_module, "filled", ("miss", "hit")),
    (attached_module, "note", ("miss", "hit")),
    (attached_module, "columns_of", ("miss", "hit")),
    (attached_module, "copy_exact", ("miss", "hit")),
    (attached_module, "stop_noting", ("miss", "hit")),
    (Observer, "identity", ("miss", "hit")),
    (Walk, "token", ("miss",)),
    (Guards, "hold", ("hit",)),
    (Layers, "of", ("miss",)),
    (Trial, "run", ("miss",)),
    (Shape, "empty", ("miss", "hit")),
    (Shape, "parts", ("miss", "hit")),
    (WithRoom, "update", ("hit",)),
    (CacheEngine, "namespace", ("miss",)),
    (CacheEngine, "keys", ("miss", "hit")),
    (CacheEngine, "lookup", ("miss", "hit")),
    (CacheEngine, "load", ("hit",)),
    (CacheEngine, "store", ("miss", "hit")),
]
"""What a call does of ours, and in which calls."""


class Silent(Exception):
    """A fault that cannot even say what it is."""

    def __repr__(self) -> str:
        raise RuntimeError


FAULTS = [
    *((owner, name, call, ZeroDivisionError) for owner, name, calls in STEPS for call in calls),
    (Trial, "run", "miss", Silent),
    (WithRoom, "update", "hit", Silent),
    (CacheEngine, "lookup", "hit", MemoryError),
]


@pytest.mark.parametrize(("owner", "name", "call", "error"), FAULTS)
def test_a_fault_of_our_own_is_not_the_callers(
    owner: Any,
    name: str,
    call: str,
    error: type[Exception],
    cache: CacheEngine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: Any,
) -> None:
    """The call is answered as without us, one line is logged, and the next is served."""
    faults = []

    def fault(*args: Any, **kwargs: Any) -> Any:
        faults.append(1)
        raise error

    model = build("llama")
    expected = greedy(model, IDS)
    with monkeypatch.context() as patch:
        if call == "miss":
            patch.setattr(owner, name, fault)
        with attach(model, cache):
            if call == "hit":
                greedy(model, IDS[:, :17])
                patch.setattr(owner, name, fault)
            assert torch.equal(greedy(model, IDS), expected)
    assert faults
    (said,) = [record.getMessage() for record in caplog.records]
    assert error.__name__ in said
    with attach(model, cache):
        greedy(model, IDS)
        before = loaded(cache)
        assert torch.equal(greedy(model, IDS), expected)
    assert loaded(cache) == before + 3


def test_an_interrupted_generate_stores_nothing(model: Any, cache: CacheEngine) -> None:
    class Stop(Exception):
        pass

    def interrupt(*_: Any) -> Any:
        raise Stop

    with attach(model, cache), pytest.raises(Stop):
        greedy(model, IDS, stopping_criteria=[interrupt])
    assert ("stored", "local_cpu") not in cache.stats()


# Attaching


def test_attach_and_detach(model: Any, cache: CacheEngine) -> None:
    own = model.generate
    attached = attach(model, cache)
    with pytest.raises(ValueError, match="attached already"):
        attach(model, cache)
    assert inspect.signature(model.generate) == inspect.signature(own)
    attached.detach()
    attached.detach()
    assert model.generate == own
    with attach(model, cache):
        assert model.generate != own
    assert model.generate == own
    attach(model, cache)
    detach(model)
    detach(model)
    assert model.generate == own


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_is_what_it_is_without_us(
    copied: Callable[[Any], Any], replaced: bool, cache: CacheEngine
) -> None:
    model = build("llama")
    expected = greedy(model, IDS)
    if replaced:  # by somebody before us, with what copies and pickles
        model.generate = functools.partial(model.generate, max_new_tokens=16)
    keys = set(vars(model))
    with attach(model, cache):
        other = copied(model)
        assert set(vars(other)) == keys
        assert torch.equal(other.generate(IDS, max_new_tokens=16, do_sample=False), expected)
        assert ("stored", "local_cpu") not in cache.stats()
        with attach(other, cache):
            greedy(other, IDS)
        assert set(vars(other)) == keys
        greedy(model, IDS)
    assert set(vars(model)) == keys
    assert loaded(cache) == 3


@pytest.mark.parametrize("part", ["", "transformer.h.0.attn"])
def test_dropout_is_never_stored(
    part: str, cache: CacheEngine, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("gpt2")
    model.get_submodule(part).train()
    modes = [module.training for module in model.modules()]
    with attach(model, cache) as attached, torch.no_grad():
        greedy(model, IDS)
        own, _ = attached.load_prefix(IDS)
        model(input_ids=IDS, use_cache=True, **{argument(model): own})
        assert attached.store(IDS, own) == 0
        assert [module.training for module in model.modules()] == modes
        assert "training mode" in caplog.text
        model.eval()
        greedy(model, IDS)
        greedy(model, IDS)
    assert loaded(cache) == 3


def test_nothing_is_stored_under_autocast(model: Any, cache: CacheEngine) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        attached = attach(model, cache)
        with torch.no_grad():
            own, _ = attached.load_prefix(IDS)
            model(input_ids=IDS, use_cache=True, **{argument(model): own})
        assert attached.store(IDS, own) == 0
    greedy(model, IDS)
    greedy(model, IDS)
    assert loaded(cache) == 3


def test_a_tier_too_small_for_a_chunk_is_an_error_at_attach(model: Any) -> None:
    tiers = [{"backend": "local_cpu", "capacity": 1000}]
    with lmcache_core.open({"chunk_size": SIZE, "tiers": tiers}) as cache:
        with pytest.raises(ConfigError, match=r"tiers\[0\].capacity: 1000 bytes hold no chunk"):
            attach(model, cache)
        assert "generate" not in vars(model)


def test_the_connector_is_found_by_name() -> None:
    assert component("connectors", "transformers") is attach
