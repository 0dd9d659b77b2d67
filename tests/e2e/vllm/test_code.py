"""The code of a model: its files are part of what is computed, those that it brings along
(trust_remote_code), and those of functions that somebody puts in the place of vLLM's."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, dynamic_module_utils
from vllm.model_executor.models.llama import LlamaMLP

from tests.e2e.vllm.conftest import engine, saved
from tests.e2e.vllm.test_changes import WHOLE, ask, known_as
from tests.e2e.vllm.test_connector import connector, flush, forget, prompt

CONFIGURATION = """
from transformers import LlamaConfig

class ToyConfig(LlamaConfig):
    model_type = "toy"
"""
MODELING = """
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_toy import ToyConfig

class ToyModel(LlamaModel):
    config_class = ToyConfig

    def forward(self, input_ids=None, position_ids=None, inputs_embeds=None, **more):
        from .scaling import scaled  # only when it is called

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        embedded = scaled(inputs_embeds)
        return super().forward(position_ids=position_ids, inputs_embeds=embedded, **more)

class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig
"""
SCALING = """
from .numbers_of_ours import SCALE

def scaled(embeddings):
    return embeddings * SCALE
"""
TOKENIZATION = "raise SystemExit"
"""Beside the model, and no part of it."""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=512, max_position_embeddings=2048,
    )  # fmt: skip
    folder = saved(config, tmp_path / "toy")
    names = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModel": "modeling_toy.ToyModel",
             "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}  # fmt: skip
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"model_type": "toy", "auto_map": names, "architectures": ["ToyForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(fields))
    code = {"configuration_toy": CONFIGURATION, "modeling_toy": MODELING, "scaling": SCALING,
            "numbers_of_ours": "SCALE = 1.5\n", "tokenization_toy": TOKENIZATION}  # fmt: skip
    for name, text in code.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_all_files_of_it(toy: Path, disk: dict[str, Any], tmp_path: Path) -> None:
    """What it imports, and what that imports, wherever it lies and however it is called."""
    ids, options = prompt(200), {"trust_remote_code": True}
    with engine(toy, disk, **options) as llm:
        cold, first = ask(llm, ids)[0], known_as(llm)
        forget(llm)
        assert ask(llm, ids) == (cold, WHOLE)
        llm.collective_rpc("check_health")
        assert known_as(llm) == first  # though more of it is loaded by now
        flush(llm)
    seen = {first}
    for name in ("modeling_toy", "scaling", "numbers_of_ours"):
        other = shutil.copytree(toy, tmp_path / f"other-{name}")
        file = other / f"{name}.py"
        file.write_text(file.read_text().replace("1.5", "1.25") + "\n# another\n")
        with engine(other, disk, **options) as llm:
            assert ask(llm, ids)[1] == 0, name
            seen.add(known_as(llm))
            flush(llm)
    assert len(seen) == 4
    (toy / "tokenization_toy.py").write_text("# what makes tokens of texts\n")
    again = shutil.copytree(toy, tmp_path / "another place")
    with engine(again, disk, **options) as llm:
        assert known_as(llm) == first
        assert ask(llm, ids) == (cold, WHOLE)


def test_functions_that_replace_vllms(
    llama: Path, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a class, as vLLM's plugins do it, or in an object."""
    ids = prompt(200)
    forward = LlamaMLP.forward

    @functools.wraps(forward)
    def half(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) / 2

    def replaced(model: Any) -> None:
        mlp = model.model.layers[1].mlp
        mlp.forward = MethodType(half, mlp)

    with engine(llama, disk) as llm:
        cold, first = ask(llm, ids)[0], known_as(llm)
        flush(llm)
    with monkeypatch.context() as patched, engine(llama, disk) as llm:
        patched.setattr(LlamaMLP, "forward", half)
        llm.collective_rpc("check_health")
        other = known_as(llm)
        assert (ask(llm, ids)[1], other != first) == (0, True)
        forget(llm)
        patched.undo()
        llm.collective_rpc("check_health")
        assert ask(llm, ids) == (cold, WHOLE)
        llm.apply_model(replaced)
        assert ask(llm, ids)[1] == 0


def test_code_that_came_from_no_file_turns_it_off(
    llama: Path, disk: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As what was typed into a notebook."""
    typed: dict[str, Any] = {"__name__": "typed"}
    exec("def forward(x): return x", typed)

    with engine(llama, disk) as llm:
        llm.apply_model(lambda model: setattr(model.model.layers[1], "helper", typed["forward"]))
        assert ask(llm, prompt(200))[1] == 0
        assert "code that came from no file (typed)" in caplog.text
        assert connector(llm)._scheduler._ranks == []


def test_what_vllm_notes_of_compiling_is_no_part_of_it(llama: Path, disk: dict[str, Any]) -> None:
    def noted(model: Any) -> None:
        model.model.was_aot_compile_fn_loaded_from_disk = True  # as in a process after the first
        model.model.compiled = True
        model.model.aot_compiled_fn = lambda *_: None

    with engine(llama, disk) as llm:
        first = known_as(llm)
        llm.apply_model(noted)
        assert known_as(llm) == first
