"""Quantised weights, and scales beside them: all that is loaded of a matrix is part of what the
model computes, in whatever form vLLM keeps it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.vllm.conftest import engine
from tests.e2e.vllm.test_changes import WHOLE, ask, known_as
from tests.e2e.vllm.test_connector import forget, prompt

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM has these forms' kernels for AVX-512"
)
Tensors = dict[str, torch.Tensor]
MATRIX = "model.layers.1.mlp.down_proj"
"""The one whose parts are changed."""


def whole_numbers(name: str, weight: torch.Tensor) -> Tensors:
    """8 bits and a scale for each output, which oneDNN packs."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {f"{name}.weight": (weight / scale).round().char(), f"{name}.weight_scale": scale}


def with_inputs(name: str, weight: torch.Tensor) -> Tensors:
    """As before, and a scale for what the matrix is multiplied with."""
    scale = {f"{name}.input_scale": torch.tensor([0.05])}
    return whole_numbers(name, weight) | scale


def four_bits(name: str, weight: torch.Tensor) -> Tensors:
    """Eight values in 32 bits, and a scale for each 32 of them."""
    outputs, inputs = weight.shape
    return {
        f"{name}.weight_packed": torch.randint(-(2**31), 2**31, (outputs, inputs // 8)).int(),
        f"{name}.weight_scale": torch.full((outputs, inputs // 32), 0.01),
        f"{name}.weight_shape": torch.tensor([outputs, inputs]),
    }


def small_floats(name: str, weight: torch.Tensor) -> Tensors:
    """Float8 and a scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn),
            f"{name}.weight_scale": scale}  # fmt: skip


def numbers(bits: int, kind: str = "int", strategy: str = "channel", **more: Any) -> dict[str, Any]:
    """How compressed-tensors describes some."""
    common = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy}
    return {**common, "dynamic": False, **more}


TOKENS = numbers(8, strategy="token", dynamic=True)
FORMS = {
    "int8": (whole_numbers, "int-quantized", numbers(8), TOKENS),
    "int8-static": (with_inputs, "int-quantized", numbers(8), numbers(8, strategy="tensor")),
    "int4": (four_bits, "pack-quantized", numbers(4, strategy="group", group_size=32), None),
    "fp8": (small_floats, "float-quantized", numbers(8, "float"),
            numbers(8, "float", "token", dynamic=True)),
}  # fmt: skip
"""Of each: what it makes of a matrix, and what the model's config says of it."""


def quantised(model: Path, folder: Path, form: str) -> Path:
    """The model with its matrices in that form, and scales for KV in 8 bits."""
    split, name, weights, inputs = FORMS[form]
    shutil.copytree(model, folder)
    file = folder / "config.json"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = json.loads(file.read_text()) | {
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": name, "ignore": ["lm_head"],
            "quantization_status": "compressed", "config_groups": {"group_0": group},
            "kv_cache_scheme": numbers(8, "float", "tensor"),
        }
    }  # fmt: skip
    file.write_text(json.dumps(config))
    torch.manual_seed(0)
    tensors: Tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        matrix = key.endswith("proj.weight")
        tensors |= split(key.removesuffix(".weight"), tensor) if matrix else {key: tensor}
    for layer in range(2):
        for part in "kv":
            tensors[f"model.layers.{layer}.self_attn.{part}_scale"] = torch.tensor(0.02)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def changed(model: Path, folder: Path, parts: Callable[[str], bool]) -> Iterator[tuple[str, Path]]:
    """The model with one value of one tensor moved, for each whose name is of those."""
    tensors = load_file(model / "model.safetensors")
    for name in filter(parts, list(tensors)):
        other = tensors[name].clone()
        last = other.view(-1)[-1:]
        last.copy_(last.float() * 2 if last.is_floating_point() else last ^ 1)
        place = shutil.copytree(model, folder / name)
        save_file({**tensors, name: other}, place / "model.safetensors", {"format": "pt"})
        yield name, place


@pytest.mark.parametrize("form", FORMS)
def test_every_part_of_a_quantised_matrix_is_part_of_what_is_computed(
    llama: Path, disk: dict[str, Any], tmp_path: Path, form: str
) -> None:
    model, ids = quantised(llama, tmp_path / "model", form), prompt(200)
    options = {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    with engine(model, disk, **options) as llm:
        ask(llm, ids)
        own = ask(llm, ids)
        forget(llm)
        assert ask(llm, ids) == own
        seen = [known_as(llm)]
    parts = changed(
        model, tmp_path, lambda name: name.startswith(f"{MATRIX}.") and "shape" not in name
    )
    for name, other in parts:
        with engine(other, disk, **options) as llm:
            assert ask(llm, ids)[1] == 0, name
            seen.append(known_as(llm))
    assert len(set(seen)) == len(seen) > 2
    with engine(model, disk, **options) as llm:
        assert ask(llm, ids) == own == (own[0], WHOLE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_of_kv_in_eight_bits_are_part_of_it(
    llama: Path, disk: dict[str, Any], tmp_path: Path, dtype: str
) -> None:
    options = {"kv_cache_dtype": "fp8", "dtype": dtype}
    model, ids = quantised(llama, tmp_path / "model", "int8"), prompt(200)
    with engine(model, disk, **options) as llm:
        ask(llm, ids)
        own = ask(llm, ids)
        forget(llm)
        assert ask(llm, ids) == own
    for name, other in changed(model, tmp_path, lambda name: name.endswith("attn.v_scale")):
        with engine(other, disk, **options) as llm:
            assert ask(llm, ids)[1] == 0, name
    with engine(model, disk, **options) as llm:
        assert ask(llm, ids) == own == (own[0], WHOLE)
