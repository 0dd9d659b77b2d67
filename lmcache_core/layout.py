"""KVLayout: what one token's keys and values are, for one worker of one model.

A chunk of n tokens is, for each layer group g, two tensors:

    "g{g}.k"  [layers, kv_heads, n, key_dim]
    "g{g}.v"  [layers, kv_heads, n, value_dim]      (absent where value_dim is 0)

laid one behind the other in one host buffer, widest dtype first, so that every tensor is aligned
to its own dtype without padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from lmcache_core.errors import LayoutError
from lmcache_core.parts import Parts, joined

Tensors = Mapping[str, torch.Tensor]
"""A chunk's tensors by name. A mapping from `CacheEngine.load` is read-only by contract."""

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name a frame uses for `dtype`. Raises LayoutError for one it cannot store."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise LayoutError(f"{dtype} cannot be stored; known: {', '.join(DTYPES)}") from None


class TensorSpec(NamedTuple):
    """Name, dtype name and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorSpec:
        """The spec of an existing tensor."""
        return cls(name, dtype_name(tensor.dtype), tuple(tensor.shape))


class LayerGroup(BaseModel):
    """Layers that keep the same thing for each token."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["attention", "sliding", "mla", "opaque"]
    """`opaque`: bytes in an engine's own packing; only lossless serdes make sense."""
    layers: tuple[int, ...] = Field(min_length=1)
    """Indices of the decoder layers, ascending."""
    kv_heads: int = Field(ge=1)
    key_dim: int = Field(ge=1)
    value_dim: int = Field(ge=0)
    dtype: str
    window: int | None = Field(default=None, ge=1)
    """Tokens that a sliding layer attends to; None for all."""

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"unknown dtype {value!r}; known: {', '.join(DTYPES)}")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list | range) else value


class KVLayout(BaseModel):
    """Ordered layer groups: all that one worker keeps for a token."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    groups: tuple[LayerGroup, ...] = Field(min_length=1)

    @field_validator("groups", mode="before")
    @classmethod
    def _tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("groups")
    @classmethod
    def _no_layer_twice(cls, groups: tuple[LayerGroup, ...]) -> tuple[LayerGroup, ...]:
        layers = [layer for group in groups for layer in group.layers]
        if len(set(layers)) != len(layers):
            raise ValueError("a layer stands in two groups")
        return groups

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV that one token takes, over all layers."""
        return sum(spec.nbytes for spec in self.tensors(1))

    def tensors(self, tokens: int) -> tuple[TensorSpec, ...]:
        """The tensors of a chunk of `tokens` tokens, in the order in which they are stored."""
        return _tensors(self.groups, tokens)

    def check(self, tensors: Tensors, tokens: int) -> None:
        """Raise LayoutError unless `tensors` are exactly what a chunk of `tokens` tokens is."""
        specs = self.tensors(tokens)
        if set(tensors) != {spec.name for spec in specs}:
            expected = ", ".join(spec.name for spec in specs)
            raise LayoutError(f"expected tensors {expected}; got {', '.join(tensors)}")
        for spec in specs:
            tensor = tensors[spec.name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
                raise LayoutError(
                    f"{spec.name}: expected {spec.dtype} {list(spec.shape)}; "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )


@lru_cache(maxsize=256)
def _tensors(groups: tuple[LayerGroup, ...], tokens: int) -> tuple[TensorSpec, ...]:
    specs: list[TensorSpec] = []
    for g, group in enumerate(groups):
        shape = (len(group.layers), group.kv_heads, tokens)
        specs.append(TensorSpec(f"g{g}.k", group.dtype, (*shape, group.key_dim)))
        if group.value_dim:
            specs.append(TensorSpec(f"g{g}.v", group.dtype, (*shape, group.value_dim)))
    return tuple(sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize))


def copy_exact(out: torch.Tensor, source: torch.Tensor) -> None:
    """Copy `source` (any device, any strides) into `out`; never convert or broadcast.

    Raises LayoutError where shape or dtype differ, which `out.copy_` would pass over.
    """
    if source.shape != out.shape or source.dtype != out.dtype:
        raise LayoutError(
            f"expected {out.dtype} {list(out.shape)}; got {source.dtype} {list(source.shape)}"
        )
    out.copy_(source.detach())


def views(parts: Parts, specs: Iterable[TensorSpec]) -> dict[str, torch.Tensor]:
    """Tensors that lie one behind the other in `parts`, with no copy of those that lie whole in
    one of them, aligned.

    They keep their parts alive. Raises LayoutError when the parts have another size.
    """
    specs = tuple(specs)
    if len(parts) == 1:
        return _views(parts[0], specs)
    tensors: dict[str, torch.Tensor] = {}
    for buffer, run in _runs(parts, specs):
        tensors |= _views(buffer, run)
    return tensors


def _runs(
    parts: Parts, specs: tuple[TensorSpec, ...]
) -> Iterator[tuple[memoryview, tuple[TensorSpec, ...]]]:
    """Both, cut where a part and a tensor end at the same place."""
    rest = iter(parts)
    buffers: list[memoryview] = []
    run: list[TensorSpec] = []
    short = 0
    for spec in specs:
        run.append(spec)
        short += spec.nbytes
        while short > 0 and (part := next(rest, None)) is not None:
            buffers.append(part)
            short -= part.nbytes
        if short == 0:
            yield joined(buffers), tuple(run)
            buffers, run = [], []
    yield joined([*buffers, *rest]), tuple(run)  # nothing, where the sizes are the same


def _views(buffer: memoryview, specs: tuple[TensorSpec, ...]) -> dict[str, torch.Tensor]:
    needed, plan = _plan(specs)
    if buffer.nbytes != needed:
        raise LayoutError(f"the tensors take {needed} bytes; the buffer has {buffer.nbytes}")
    if not needed:
        return {name: torch.empty(shape, dtype=dtype) for name, dtype, shape, *_ in plan}
    whole = torch.from_numpy(byte_array(buffer))  # one for all: `byte_view` sees neighbours
    place = whole.data_ptr()
    typed: dict[torch.dtype, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, dtype, shape, strides, offset in plan:
        if offset % dtype.itemsize or place % dtype.itemsize:  # torch wants its elements aligned
            part = whole[offset : offset + math.prod(shape) * dtype.itemsize].clone()
            tensors[name] = part.view(dtype).view(shape)
            continue
        if dtype not in typed:
            typed[dtype] = whole[: needed - needed % dtype.itemsize].view(dtype)
        tensors[name] = typed[dtype].as_strided(shape, strides, offset // dtype.itemsize)
    return tensors


_Placed = tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], int]
"""Name, dtype, shape, strides in elements, offset in bytes."""


@lru_cache(maxsize=256)
def _plan(specs: tuple[TensorSpec, ...]) -> tuple[int, tuple[_Placed, ...]]:
    """Bytes in all, and where each tensor lies."""
    plan: list[_Placed] = []
    offset = 0
    for spec in specs:
        strides = tuple(math.prod(spec.shape[n + 1 :]) for n in range(len(spec.shape)))
        plan.append((spec.name, DTYPES[spec.dtype], spec.shape, strides, offset))
        offset += spec.nbytes
    return offset, tuple(plan)


def byte_array(buffer: memoryview) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A buffer as torch and compiled loops take it even where it is read-only (a client library's
    `bytes`), as a chunk's tensors are by contract."""
    return np.asarray(_Memory(buffer)) if buffer.readonly else np.frombuffer(buffer, np.uint8)


class _Memory:
    """A read-only buffer that numpy takes for a writable one."""

    def __init__(self, buffer: memoryview) -> None:
        interface = np.frombuffer(buffer, np.uint8).__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self._keep = buffer


def byte_view(tensors: Iterable[torch.Tensor]) -> list[memoryview]:
    """The bytes of contiguous host tensors, in order; neighbours in memory become one buffer."""
    runs: list[list[torch.Tensor]] = []
    end: tuple[int, int] | None = None
    for tensor in tensors:
        if tensor.nbytes == 0:
            continue
        here = (tensor.untyped_storage().data_ptr(), tensor.data_ptr())
        if here == end:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
        end = (here[0], here[1] + tensor.nbytes)
    return [_run_bytes(run) for run in runs]


def _run_bytes(run: list[torch.Tensor]) -> memoryview:
    first = run[0]
    if not all(tensor.is_contiguous() for tensor in run):
        raise LayoutError("tensors to store must be contiguous")
    length = sum(tensor.nbytes for tensor in run)
    # Beyond the first tensor's end lie its neighbours, in the same storage.
    return first.view(-1).view(torch.uint8).as_strided((length,), (1,)).numpy().data
