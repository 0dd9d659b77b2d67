"""coded: steps of even size for an entropy coder. With zstd about 4.3x for bf16, at the default.

    serde: [coded, zstd]        # on its own it takes eight bits a value

int4 gives every value four bits, also the many near the middle of their range. Steps of one size,
a fraction of the standard deviation, need few bits for those and many for the rare ones far off:
what an entropy coder behind them makes use of, and at the same error the smallest that a scalar
quantizer gets (Gish and Pierce 1968). Keys have their steps by channel around its mean, values by
token, as in KIVI (arXiv:2402.02750). CacheGen (arXiv:2310.07240) codes differences from a near
token instead; on the KV measured here that takes more bits for more error.

    value = code * scale + mean        mean: of keys only
"""

from __future__ import annotations

import torch
from pydantic import Field

from lmcache_core.serde import Tensors
from lmcache_serde._quantizer import SMALLEST, Quantizer, QuantizerOptions, scale_dtype, write

REACH = 119.0
"""Codes that the largest deviation may take: with the rounding of the scale none is above 127."""


class CodedOptions(QuantizerOptions):
    """`step`: in standard deviations; smaller is more exact and takes more space."""

    step: float = Field(default=0.35, gt=0, le=2)


class Coded(Quantizer):
    """An error is at most half a step, 1/16 more where the scale was rounded up, and rounding."""

    name = "coded"
    Options = CodedOptions

    def quantize(
        self, tensor: torch.Tensor, peaks: torch.Tensor, part: str
    ) -> dict[str, torch.Tensor]:
        along, out = (-2 if part == "k" else -1), {}
        values = tensor.to(torch.float32, copy=True)
        if part == "k":
            # Divided first, for the sum of large numbers is none.
            out["mean"] = (
                (values / values.shape[along])
                .sum(along, keepdim=True)
                .to(scale_dtype(tensor.dtype))
            )
            values.sub_(out["mean"].float())
        scale = _coarse(self._steps(values, along))
        out["codes"] = values.div_(scale.float()).round_().clamp_(-127, 127).to(torch.int8)
        return {**out, "scale": scale}

    def _steps(self, values: torch.Tensor, along: int) -> torch.Tensor:
        """`step` standard deviations, or so much that codes reach the largest deviation."""
        largest = values.abs().amax(along, keepdim=True).clamp_min_(SMALLEST)
        deviation = (values / largest).square_().mean(along, keepdim=True).sqrt_()  # no overflow
        return largest.mul_(deviation.mul_(self.options.step).clamp_min_(1 / REACH))

    def encoded(
        self, shape: tuple[int, ...], dtype: torch.dtype, part: str
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        if part == "v":
            return {"codes": (torch.int8, shape), "scale": (torch.bfloat16, (*shape[:-1], 1))}
        channels = (*shape[:2], 1, shape[3])
        return {
            "mean": (scale_dtype(dtype), channels),
            "codes": (torch.int8, shape),
            "scale": (torch.bfloat16, channels),
        }

    def dequantize(self, parts: Tensors, part: str, out: torch.Tensor) -> None:
        codes, scale = parts["codes"], parts["scale"]
        if out.dtype == torch.bfloat16:
            torch.mul(codes, scale, out=out)
            if part == "k":
                out.add_(parts["mean"])
            return
        values = codes.float().mul_(scale)
        write(out, values.add_(parts["mean"]) if part == "k" else values)


def _coarse(scale: torch.Tensor) -> torch.Tensor:
    """As bfloat16 with three bits of mantissa: exact enough, and half the bits once coded."""
    bits = scale.clamp_min_(SMALLEST).bfloat16().view(torch.int16)
    return bits.add_(8).bitwise_and_(-16).view(torch.bfloat16)
