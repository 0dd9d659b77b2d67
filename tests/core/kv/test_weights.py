"""What a namespace says of weights: all bytes, or somebody's word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lmcache_core
from lmcache_core import Namespace, Weights, unverified, weights_digest
from lmcache_core.testing import tiny_layout

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(5).to(torch.bfloat16),
    "c": torch.tensor([True, False]),
    "scale": torch.tensor([2.0]).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 3),
}


def test_tensors_a_module_and_files_have_one_digest_wherever_they_lie(tmp_path: Path) -> None:
    digest = weights_digest(TENSORS)
    save_file(TENSORS, tmp_path / "whole.safetensors", {"a note": "says nothing"})
    assert weights_digest(tmp_path / "whole.safetensors") == digest
    for name, tensor in TENSORS.items():
        (tmp_path / "parts").mkdir(exist_ok=True)
        save_file({name: tensor}, tmp_path / "parts" / f"{name}.safetensors")
    assert weights_digest(tmp_path / "parts") == digest
    assert weights_digest(dict(reversed(TENSORS.items()))) == digest
    module = torch.nn.Module()
    for name, tensor in TENSORS.items():
        module.register_buffer(name, tensor, persistent=name != "b")
    assert weights_digest(module) == digest


@pytest.mark.parametrize("name", ["a", "b", "c", "scale"])
def test_any_bit_of_any_tensor_is_in_it(name: str) -> None:
    tensors = {key: tensor.clone() for key, tensor in TENSORS.items()}
    tensors[name].view(torch.uint8).view(-1)[-1] ^= 1
    assert weights_digest(tensors) != weights_digest(TENSORS)


@pytest.mark.parametrize(
    "others",
    [
        {**TENSORS, "d": torch.zeros(1)},
        {("x" if name == "a" else name): tensor for name, tensor in TENSORS.items()},
        {**TENSORS, "a": TENSORS["a"].view(4, 3)},
        {**TENSORS, "a": TENSORS["a"].view(torch.int32)},
    ],
)
def test_names_shapes_and_dtypes_are_in_it(others: dict[str, torch.Tensor]) -> None:
    assert weights_digest(others) != weights_digest(TENSORS)


def test_what_is_no_file_of_safetensors_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="safetensors"):
        weights_digest(tmp_path)
    for content in (b"short", b"\xff" * 8 + b"{}", (9).to_bytes(8, "little") + b'{"a": 5} '):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            weights_digest(tmp_path)


@pytest.mark.parametrize("fields", [{}, {"weights": ""}, {"weights": None}, {"weights": 5}])
def test_a_namespace_without_weights_is_an_error_that_says_how(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"weights_digest\(model\).*unverified"):
        Namespace(model="m", layout=tiny_layout(), **fields)
    with (
        lmcache_core.open({"tiers": [{"backend": "local_cpu", "capacity": "8MiB"}]}) as cache,
        pytest.raises(ValueError, match=r"weights_digest\(model\)"),
    ):
        cache.namespace(model="m", layout=tiny_layout(), **fields)


def test_a_word_is_shown_as_one() -> None:
    namespace = Namespace(model="m", layout=tiny_layout(), weights=unverified("v1"))
    assert json.loads(namespace.document)["weights"]["unverified"] == "v1"
    assert str(namespace.weights) == "unverified: v1"
    assert Namespace.from_document(namespace.document) == namespace
    text = Namespace(model="m", layout=tiny_layout(), weights="v1")  # type: ignore[arg-type]
    assert text == namespace
    digest = weights_digest(TENSORS)
    verified = namespace.model_copy(update={"weights": digest})
    assert verified.digest != namespace.digest
    assert str(verified.weights) == digest.digest
    assert Namespace.from_document(verified.document) == verified
    for wrong in ({}, {"digest": "0" * 32, "unverified": "x"}, {"digest": "short"}):
        with pytest.raises(ValueError, match="Weights"):
            Weights(**wrong)
