"""fp8: e4m3 with one scale for each token, head and layer. About 1.94x for bf16.

The scale maps a token's largest magnitude to 448, the largest e4m3 number, so nothing saturates.
Three bits of mantissa: an error is at most 1/16 of the value, or 1/2**10 of a scale near zero.
"""

from __future__ import annotations

import torch

from lmcache_core.serde import Tensors
from lmcache_serde._quantizer import SMALLEST, Quantizer, scale_dtype, write

LARGEST_E4M3 = 448.0


class Fp8(Quantizer):
    """Keeps small values of a token better than int8, and large ones worse."""

    name = "fp8"

    def quantize(
        self, tensor: torch.Tensor, peaks: torch.Tensor, part: str
    ) -> dict[str, torch.Tensor]:
        scale = (peaks.float() / LARGEST_E4M3).clamp_min_(SMALLEST).to(scale_dtype(tensor.dtype))
        scaled = tensor.to(torch.float32, copy=True).div_(scale.float())
        codes = scaled.clamp_(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
        return {"codes": codes, "scale": scale}

    def encoded(
        self, shape: tuple[int, ...], dtype: torch.dtype, part: str
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            "codes": (torch.float8_e4m3fn, shape),
            "scale": (scale_dtype(dtype), (*shape[:-1], 1)),
        }

    def dequantize(self, parts: Tensors, part: str, out: torch.Tensor) -> None:
        codes, scale = parts["codes"], parts["scale"]
        if out.dtype == torch.bfloat16:
            _to_bfloat16(codes, out).mul_(scale)
        else:
            values = _to_bfloat16(codes, torch.empty(out.shape, dtype=torch.bfloat16))
            write(out, values.float().mul_(scale))


def _to_bfloat16(codes: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The same numbers in bfloat16, ten times as fast as a cast on a CPU.

    Shifted by four bits, exponent and mantissa of e4m3 stand where bfloat16 has the low bits of
    its exponent and the high ones of its mantissa: the number, subnormals too, times 2**-120.
    """
    bits = out.view(torch.int16)
    bits.copy_(codes.view(torch.int8))  # extends the sign
    bits.bitwise_left_shift_(4).bitwise_and_(-0x7810)  # 0x87f0: sign, exponent, mantissa
    return out.mul_(2.0**120)
