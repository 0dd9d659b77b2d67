"""What the quantizers share: which values they keep exact, and that NaN and Inf survive.

Of a tensor [layers, kv_heads, tokens, dim] a quantizer is given only what it may round. Kept as
they are:

    chosen layers        `exact_layers`
    the first tokens     `exact_tokens`, of a sequence's first chunk: attention sinks, whose large
                         values would cost the others their precision
    tokens that hold NaN, Inf or numbers so large that scaling could overflow
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from pydantic import Field

from lmcache_core.serde import (
    DTYPES,
    ChunkInfo,
    FrameOptions,
    LayoutError,
    Options,
    Tensors,
    TensorsToTensors,
    pooled_empty,
)

LARGEST = 1e37
"""Larger numbers are kept as they are."""
SMALLEST = 1e-37
"""A scale is at least this, so that all-zero and denormal tokens divide by something."""
SLICES = 4
"""Layers are taken in so many parts, so that their values in float32 are half a chunk at most."""


def _without(tensor: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The tensor with tokens that are kept elsewhere replaced by one that is not, so that they
    widen no range; by zero where all are."""
    others = torch.ones(tensor.shape[2], dtype=torch.bool, device=tensor.device)
    others[kept] = False
    if not others.any():
        return torch.zeros_like(tensor)
    return tensor.index_copy(
        2, kept, tensor[:, :, others.nonzero()[:1, 0]].expand(-1, -1, kept.numel(), -1)
    )


def magnitudes(tensor: torch.Tensor) -> torch.Tensor:
    """Largest magnitude over the last dimension, kept as 1; NaN counts as the largest.

    Without their sign bit floats are in the order of their bits, and integers have a fast maximum.
    """
    integer = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    bits = tensor.contiguous().view(integer) & torch.iinfo(integer).max
    return bits.amax(dim=-1, keepdim=True).view(tensor.dtype)


def write(out: torch.Tensor, values: torch.Tensor) -> None:
    """Copy numbers that rounding may have carried beyond the largest of `out`'s dtype."""
    largest = torch.finfo(out.dtype).max
    if out.dtype == torch.float16:  # its largest is no number of bfloat16, but Inf can be limited
        out.copy_(values).clamp_(-largest, largest)
    else:  # beyond the largest of fp8 is NaN
        out.copy_(values.clamp_(-largest, largest))


class QuantizerOptions(Options):
    """`exact_tokens`: how many of a sequence's first tokens to keep exact.
    `exact_layers`: numbers of the decoder layers to keep exact."""

    exact_tokens: int = Field(default=4, ge=0)
    exact_layers: tuple[int, ...] = ()


class QuantizerRecorded(FrameOptions):
    """`exact_layers`, as in the config."""

    exact_layers: tuple[int, ...] = Field(default=(), max_length=1024)


class Quantizer(TensorsToTensors):
    """Base of the lossy serdes. Subclasses round tensors of finite, moderate numbers."""

    Options = QuantizerOptions
    Recorded = QuantizerRecorded
    known_size = True
    keeps_input = True

    @abstractmethod
    def quantize(
        self, tensor: torch.Tensor, peaks: torch.Tensor, part: str
    ) -> dict[str, torch.Tensor]:
        """Codes and scales by name, each with layers as its first dimension.

        tensor: [layers, kv_heads, tokens, dim], float32, float16 or bfloat16, not to be changed.
        peaks: largest magnitudes over dim, [layers, kv_heads, tokens, 1], the same dtype.
        part: "k" or "v".
        """

    @abstractmethod
    def encoded(
        self, shape: tuple[int, ...], dtype: torch.dtype, part: str
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What `quantize` makes of a tensor of this shape, for KV of this dtype: what a frame has
        to hold, name by name."""

    @abstractmethod
    def dequantize(self, parts: Tensors, part: str, out: torch.Tensor) -> None:
        """Fill `out`, [layers, kv_heads, tokens, dim], contiguous, from its codes and scales."""

    def encode(self, tensors: Tensors, info: ChunkInfo) -> Tensors:
        """Each tensor "x" becomes "x.*"."""
        out: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            group, part = info.layout.split(name)
            if group.kind == "opaque":
                raise LayoutError(f"{self.name} cannot round KV in an engine's own packing")
            exact, rounded = self._layers(group.layers, tensor.device)
            if exact.numel():
                out[f"{name}.layers"] = tensor[exact]
            if rounded.numel() and tensor.numel():
                made = self._encode(tensor, rounded, part, info.index)
                out.update((f"{name}.{suffix}", each) for suffix, each in made.items())
        return out

    def _encode(
        self, tensor: torch.Tensor, rounded: torch.Tensor, part: str, index: int
    ) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        slices = _slices(rounded)
        peaks = [magnitudes(_wide(_rows(tensor, rounded, rows))) for rows in slices]
        kept = self._kept_tokens(torch.cat(peaks), index)
        if kept.numel():
            out["kept"] = tensor[:, :, kept][rounded]
            out["at"] = kept.to(torch.int32)
        done = []
        for rows, largest in zip(slices, peaks, strict=True):
            values = _wide(_rows(tensor, rounded, rows))
            if kept.numel():
                values, largest = _without(values, kept), _without(largest, kept)
            done.append(self.quantize(values, largest, part))
        for suffix in list(done[0]):
            out[suffix] = torch.cat([parts.pop(suffix) for parts in done])
        return out

    def _kept_tokens(self, peaks: torch.Tensor, index: int) -> torch.Tensor:
        """Numbers of the tokens to keep as they are, ascending."""
        keep = ~(peaks.float() < LARGEST).all(dim=0).all(dim=0).view(-1)  # NaN is not less
        if index == 0:
            keep[: self.options.exact_tokens] = True
        return keep.nonzero().view(-1)

    def _layers(
        self, layers: tuple[int, ...], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the group's tensors to keep exact, and to round."""
        exact = torch.tensor([layer in self.options.exact_layers for layer in layers])
        numbers = torch.arange(len(layers))
        return numbers[exact].to(device), numbers[~exact].to(device)

    def decode(self, tensors: Tensors, info: ChunkInfo) -> Tensors:
        """The layout's tensors. Raises ValueError where shapes or dtypes are not as encoded."""
        out: dict[str, torch.Tensor] = {}
        left = dict(tensors)
        for spec in info.layout.tensors(info.tokens):
            group, part = info.layout.split(spec.name)
            exact, rounded = self._layers(group.layers, torch.device("cpu"))
            whole = pooled_empty(spec.shape, DTYPES[spec.dtype], torch.device("cpu"))
            prefix = f"{spec.name}."
            parts = {n.removeprefix(prefix): left.pop(n) for n in tensors if n.startswith(prefix)}
            if exact.numel():
                whole[exact] = _like(
                    parts.pop("layers"), whole.dtype, (len(exact), *whole.shape[1:])
                )
            if rounded.numel() and whole.numel():
                self._decode(parts, rounded, part, whole)
            elif parts:
                raise ValueError(f"{spec.name} has {', '.join(parts)} beside its exact layers")
            out[spec.name] = whole
        if left:
            raise ValueError(f"there are no tensors {', '.join(left)}")
        return out

    def _decode(
        self, parts: dict[str, torch.Tensor], rounded: torch.Tensor, part: str, whole: torch.Tensor
    ) -> None:
        at = parts.pop("at", torch.empty(0, dtype=torch.int32))
        kept = parts.pop("kept", whole[: len(rounded), :, :0])
        count = min(at.numel(), whole.shape[2])
        _like(at, torch.int32, (count,))
        _like(kept, whole.dtype, (len(rounded), whole.shape[1], count, whole.shape[3]))
        expected = self.encoded((len(rounded), *whole.shape[1:]), whole.dtype, part)
        if parts.keys() != expected.keys():
            raise ValueError(f"has {', '.join(parts)}; expected {', '.join(expected)}")
        for suffix, (dtype, shape) in expected.items():
            _like(parts[suffix], dtype, shape)
        for rows in _slices(rounded):
            out = _rows(whole, rounded, rows)  # a copy where rows between are exact
            self.dequantize({n: each[rows] for n, each in parts.items()}, part, out)
            if at.numel():
                out[:, :, at.long()] = kept[rows]
            if len(rounded) < len(whole):
                whole[rounded[rows]] = out


def _like(tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The tensor, which is a frame's. Raises ValueError unless it is exactly that: another shape
    would be broadcast."""
    if tensor.dtype != dtype or tensor.shape != torch.Size(shape):
        raise ValueError(f"{tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}")
    return tensor


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scales are written in for KV of this dtype."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def _slices(rounded: torch.Tensor) -> list[slice]:
    """SLICES of the rows to round, or fewer."""
    step = -(-len(rounded) // SLICES)
    return [slice(start, start + step) for start in range(0, len(rounded), step)]


def _rows(tensor: torch.Tensor, rounded: torch.Tensor, rows: slice) -> torch.Tensor:
    """Those of a slice; a view where all rows are to be rounded."""
    return tensor[rows] if len(rounded) == len(tensor) else tensor[rounded[rows]]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Of 16 bits where it has 8: fp8 fits exactly."""
    return tensor.bfloat16() if tensor.dtype.itemsize == 1 else tensor
