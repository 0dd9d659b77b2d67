"""LoRA adapters: each combination of adapters and strengths is a model of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lmcache_core
from lmcache_connectors.transformers import attach, detach
from lmcache_core import CacheEngine
from tests.connectors.transformers.test_generate import build, config, greedy, loaded, tokens

pytestmark = pytest.mark.filterwarnings("ignore")

LORA = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
IDS = tokens(1, 30)


@pytest.fixture
def cache() -> Iterator[CacheEngine]:
    with lmcache_core.open(config()) as engine:
        yield engine


def test_no_two_states_of_adapters_share_anything(cache: CacheEngine) -> None:
    def asked() -> int:
        """Chunks that were reused; the answer is that of the model in this state."""
        before = loaded(cache)
        with attach(base, cache):
            got = greedy(base, IDS)
        assert torch.equal(got, greedy(base, IDS))
        return loaded(cache) - before

    torch.manual_seed(1)
    model: Any = get_peft_model(build("llama"), LORA, adapter_name="one")
    base = model.get_base_model()
    assert [asked(), asked()] == [0, 3]
    model.add_adapter("two", LORA)
    model.set_adapter("two")
    assert [asked(), asked()] == [0, 3]
    model.set_adapter("one")
    assert [asked(), asked()] == [0, 3]
    with model.disable_adapter():
        assert [asked(), asked()] == [0, 3]
    assert asked() == 3
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["one"] *= 3
    assert [asked(), asked()] == [0, 3]


def test_adapters_may_be_switched_while_attached(cache: CacheEngine) -> None:
    base = build("llama")
    plain = greedy(base, IDS)
    with attach(base, cache):
        assert torch.equal(greedy(base, IDS), plain)
        torch.manual_seed(1)
        model: Any = get_peft_model(base, LORA)  # puts its layers into `base`
        assert not torch.equal(model.generate(input_ids=IDS, max_new_tokens=16), plain)
        assert loaded(cache) == 0
        model.merge_adapter()  # writes where PyTorch does not count it
        greedy(base, IDS)
        model.unmerge_adapter()
        assert loaded(cache) == 0
        with model.disable_adapter():
            assert torch.equal(greedy(base, IDS), plain)
        assert loaded(cache) == 0


def test_a_peft_model_generates_through_its_base(cache: CacheEngine) -> None:
    torch.manual_seed(1)
    model: Any = get_peft_model(build("llama"), LORA)
    expected = model.generate(input_ids=IDS, max_new_tokens=16, do_sample=False)
    with attach(model.get_base_model(), cache):
        for _ in range(2):
            got = model.generate(input_ids=IDS, max_new_tokens=16, do_sample=False)
            assert torch.equal(got, expected)
    assert loaded(cache) == 3


def test_a_peft_model_may_be_attached_itself(cache: CacheEngine) -> None:
    torch.manual_seed(1)
    model: Any = get_peft_model(build("llama"), LORA)
    expected = model.generate(input_ids=IDS, max_new_tokens=16, do_sample=False)
    attach(model, cache)
    with pytest.raises(ValueError, match="attached already"):
        attach(model.get_base_model(), cache)
    for _ in range(2):
        got = model.generate(input_ids=IDS, max_new_tokens=16, do_sample=False)
        assert torch.equal(got, expected)
    detach(model)
    assert "generate" not in vars(model.get_base_model())
    assert loaded(cache) == 3
