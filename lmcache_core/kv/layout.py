"""KVLayout: what one token's keys and values are, for one worker of one model.

A chunk of n tokens is, for each layer group g, two tensors:

    "g{g}.k"  [layers, kv_heads, n, key_dim]
    "g{g}.v"  [layers, kv_heads, n, value_dim]      (absent where value_dim is 0)

laid one behind the other in one host buffer, widest dtype first, so that every tensor is aligned
to its own dtype without padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from lmcache_core.errors import LayoutError

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

    def split(self, name: str) -> tuple[LayerGroup, Literal["k", "v"]]:
        """The group and the part that a tensor's name stands for. Raises LayoutError for a name
        that no tensor of this layout has."""
        for g, group in enumerate(self.groups):
            if name == f"g{g}.k":
                return group, "k"
            if name == f"g{g}.v" and group.value_dim:
                return group, "v"
        raise LayoutError(f"no tensor of the layout: {name!r}")

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
