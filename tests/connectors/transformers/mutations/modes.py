"""What is in force around a call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.connectors.transformers.mutations import mutation


class Doubles(TorchFunctionMode):
    """Doubles what each linear layer gives."""

    factor = 2.0

    def __torch_function__(
        self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        return out * self.factor if function is torch.nn.functional.linear else out


class Rounds(TorchDispatchMode):
    """Rounds what each multiplication of matrices gives."""

    def __torch_dispatch__(
        self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return (out * 4).round() / 4
        return out


@mutation()
def torch_function_mode(model: Any) -> Iterator[Any]:
    yield
    with Doubles():
        yield


@mutation(refused=True)
def attribute_of_a_torch_function_mode(model: Any) -> Iterator[Any]:
    mode = Doubles()
    mode.factor = 1.0
    with mode:
        yield
        mode.factor = 2.0
        yield


@mutation()
def torch_dispatch_mode(model: Any) -> Iterator[Any]:
    yield
    with Rounds():
        yield


@mutation("llama", "gemma3", dtypes=("float32",))
def autocast(model: Any) -> Iterator[Any]:
    yield
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@mutation("llama", dtypes=("float32",))
def autocast_within_a_module(model: Any) -> Iterator[Any]:
    yield
    layer = model.model.layers[0].self_attn.o_proj
    forward = layer.forward

    def lower(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(x).float()

    layer.forward = lower
    yield


@mutation()
def autocast_of_another_kind(model: Any) -> Iterator[Any]:
    """Set for the thread, as frameworks for training do, and not by `with`."""
    yield
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    yield
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_dtype("cpu", torch.bfloat16)
    torch.clear_autocast_cache()


@mutation(alters=None)
def precision_of_matrices(model: Any) -> Iterator[Any]:
    yield
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@mutation(alters=None)
def without_mkldnn(model: Any) -> Iterator[Any]:
    yield
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@mutation(alters=None)
def kernel_of_attention(model: Any) -> Iterator[Any]:
    yield
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@mutation("llama", alters=None)
def default_dtype(model: Any) -> Iterator[Any]:
    yield
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@mutation(alters=False)
def modes_entered_and_left(model: Any) -> Iterator[Any]:
    yield
    with contextlib.suppress(RuntimeError), Doubles(), Rounds(), torch.autocast("cpu"):
        pass
    yield
