"""int4: four bits a value, asymmetric. About 3.2x for bf16 with groups of 32, 3.55x with 64.

Keys have channels that are large for every token, so each channel of a head has its own range, in
groups of tokens. Values have no such channels, so each token has its own, in groups of channels.
This is the scheme of KIVI (Liu et al. 2024, arXiv:2402.02750).

    value = code * scale + low        low, scale: of a group, 16 bits each
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field

from lmcache_core.serde import Tensors
from lmcache_serde._quantizer import (
    SMALLEST,
    Quantizer,
    QuantizerOptions,
    QuantizerRecorded,
    scale_dtype,
    write,
)

LEVELS = 15


class Int4Options(QuantizerOptions):
    """`group`: values that share a range; smaller is more exact and takes more space."""

    group: int = Field(default=32, ge=2)


class Int4Recorded(QuantizerRecorded):
    """`group`, as in the config."""

    group: int = Field(default=32, ge=2)


class Int4(Quantizer):
    """An error is at most one half of a 15th of the group's range, and rounding to 16 bits."""

    name = "int4"
    Options = Int4Options
    Recorded = Int4Recorded

    def quantize(
        self, tensor: torch.Tensor, peaks: torch.Tensor, part: str
    ) -> dict[str, torch.Tensor]:
        wide = scale_dtype(tensor.dtype)
        grouped = self._grouped(tensor.to(torch.float32, copy=True), part)
        along = -2 if part == "k" else -1
        low = grouped.amin(dim=along, keepdim=True).to(wide)
        high = grouped.amax(dim=along, keepdim=True)
        scale = ((high - low.float()) / LEVELS).clamp_min_(SMALLEST).to(wide)
        codes = grouped.sub_(low.float()).div_(scale.float()).round_().clamp_(0, LEVELS)
        return {"codes": _pack(codes.to(torch.uint8)), "low": low, "scale": scale}

    def encoded(
        self, shape: tuple[int, ...], dtype: torch.dtype, part: str
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        layers, heads, tokens, dim = shape
        group, wide = self._group(shape, part), scale_dtype(dtype)
        if part == "k":
            groups: tuple[int, ...] = (layers, heads, -(-tokens // group), 1, dim)
        else:
            groups = (layers, heads, tokens, -(-dim // group), 1)
        half = (math.prod(groups[1:]) * group + 1) // 2
        return {
            "codes": (torch.uint8, (layers, half)),
            "low": (wide, groups),
            "scale": (wide, groups),
        }

    def dequantize(self, parts: Tensors, part: str, out: torch.Tensor) -> None:
        low, scale = parts["low"], parts["scale"]
        along = -2 if part == "k" else -1
        grouped = list(low.shape)
        grouped[along] = self._group(out.shape, part)
        fits = math.prod(grouped) == out.numel() and low.dtype == out.dtype
        values = out.view(grouped) if fits else torch.empty(grouped, dtype=low.dtype)
        _unpack(values.flatten(1), parts["codes"])
        values.mul_(scale).add_(low)
        if not fits:
            layers, heads, tokens, dim = out.shape
            flat = values.view(layers, heads, -1, dim) if part == "k" else values.flatten(3)
            write(out, flat[:, :, :tokens, :dim])

    def _group(self, shape: Sequence[int], part: str) -> int:
        """As many as the option says, or as there are."""
        return min(int(self.options.group), shape[2] if part == "k" else shape[3])

    def _grouped(self, tensor: torch.Tensor, part: str) -> torch.Tensor:
        """Keys as [layers, kv_heads, groups, group, dim], values as [layers, kv_heads, tokens,
        groups, group]; what is missing in the last group repeats its last number."""
        layers, heads, tokens, dim = tensor.shape
        group = self._group(tensor.shape, part)
        if part == "k":
            padded = _padded(tensor, 2, -tokens % group)
            return padded.view(layers, heads, -1, group, dim)
        return _padded(tensor, 3, -dim % group).view(layers, heads, tokens, -1, group)


def _padded(tensor: torch.Tensor, along: int, count: int) -> torch.Tensor:
    """The tensor with its last slice along a dimension repeated `count` times more."""
    if not count:
        return tensor
    last = tensor.narrow(along, tensor.shape[along] - 1, 1)
    return torch.cat([tensor, *[last] * count], dim=along)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte: of each layer the first half in the low bits, the second in the high."""
    flat = codes.flatten(1)
    half = (flat.shape[1] + 1) // 2
    packed = flat[:, :half].clone()
    packed[:, : flat.shape[1] - half] |= flat[:, half:] << 4
    return packed


def _unpack(out: torch.Tensor, packed: torch.Tensor) -> None:
    half = packed.shape[1]
    out[:, :half] = packed & LEVELS
    out[:, half:] = (packed >> 4)[:, : out.shape[1] - half]
