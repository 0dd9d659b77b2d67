"""int8: eight bits a value, one scale for each token, head and layer. About 1.94x for bf16.

Symmetric: value = code * scale, scale = largest magnitude / 127. An error is at most one half of
a scale, and a little more where rounding the scale to 16 bits made it smaller.
"""

from __future__ import annotations

import torch

from lmcache_core.serde import Tensors
from lmcache_serde._quantizer import SMALLEST, Quantizer, scale_dtype, write


class Int8(Quantizer):
    """Values within about 0.4 % of the largest magnitude of their token and head."""

    name = "int8"

    def quantize(
        self, tensor: torch.Tensor, peaks: torch.Tensor, part: str
    ) -> dict[str, torch.Tensor]:
        scale = (peaks.float() / 127).clamp_min_(SMALLEST).to(scale_dtype(tensor.dtype))
        codes = tensor.to(torch.float32, copy=True).mul_(scale.float().reciprocal())
        codes = codes.round_().clamp_(-127, 127).to(torch.int8)
        return {"codes": codes, "scale": scale}

    def encoded(
        self, shape: tuple[int, ...], dtype: torch.dtype, part: str
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"codes": (torch.int8, shape), "scale": (scale_dtype(dtype), (*shape[:-1], 1))}

    def dequantize(self, parts: Tensors, part: str, out: torch.Tensor) -> None:
        codes, scale = parts["codes"], parts["scale"]
        if out.dtype == torch.bfloat16:
            torch.mul(codes, scale, out=out)
        else:
            write(out, codes.float().mul_(scale))
