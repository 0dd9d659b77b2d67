"""byteplane: lossless; sorts the bits of floats so that a general compressor finds what repeats.

    serde: [byteplane, zstd]        # about 1.5x for bf16, where zstd alone has 1.28x

Signs and mantissas of KV are noise. Exponents are not: those of one channel are nearly the same
for every token. So a tensor [..., tokens, channels] is written as

    one byte a channel     its typical exponent
    one plane              each exponent, less that of its channel, modulo 256
    further planes         sign and upper mantissa, then the other bytes of mantissa

and the planes of noise come last, so that whole blocks of them are stored as they are. Tensors
that hold no floats of 16 or 32 bits are written unchanged. Splitting exponents from mantissas is
the idea of ZipNN (Hershcovitch et al. 2024, arXiv:2411.05239); taking the channel into account is
what goes beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmcache_core import Tensors, TensorSpec, TensorsToBytes, scratch, views

SAMPLE = 32
"""Tokens that the typical exponent is the mean of."""
_FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}


class BytePlane(TensorsToBytes):
    """The payload has the tensors' size, and one byte more for each channel of a head."""

    name = "byteplane"

    def encode(self, tensors: Tensors) -> list[memoryview]:
        specs = [TensorSpec.of(name, tensor) for name, tensor in tensors.items()]
        heads, tails = _sections(specs)
        first, head = _allocate(heads)
        last, tail = _allocate(tails)
        for spec, tensor in zip(specs, tensors.values(), strict=True):
            width = _width(spec)
            if not width:
                head.pop(0).copy_(tensor.reshape(-1).view(torch.uint8))
            elif tensor.numel():
                split = _split16 if width == 2 else _split32
                split(tensor, head.pop(0), head.pop(0), [tail.pop(0) for _ in range(width - 1)])
            else:
                del head[:2], tail[: width - 1]
        return [first, last]

    def decode(self, payload: memoryview, specs: Sequence[TensorSpec]) -> Tensors:
        heads, tails = _sections(specs)
        named = [TensorSpec(str(n), "uint8", s) for n, s in enumerate((*heads, *tails))]
        pieces = list(views(payload, named).values())
        head, tail = pieces[: len(heads)], pieces[len(heads) :]
        out: dict[str, torch.Tensor] = {}
        for spec in specs:
            width, dtype = _width(spec), getattr(torch, spec.dtype)
            if not width:
                out[spec.name] = head.pop(0).view(dtype).view(spec.shape)
                continue
            base, exponents = head.pop(0), head.pop(0)
            planes = [tail.pop(0) for _ in range(width - 1)]
            out[spec.name] = scratch(spec.shape, dtype, torch.device("cpu"))
            merge = _merge16 if width == 2 else _merge32
            merge(out[spec.name], exponents + base, planes)
        return out


def _width(spec: TensorSpec) -> int:
    """Bytes of a float that is split; 0 for what is not."""
    return _FLOATS.get(spec.dtype, 0) if len(spec.shape) >= 2 else 0


def _size(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _sections(
    specs: Sequence[TensorSpec],
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes, in bytes, of what comes first (typical exponents, exponents) and last (noise)."""
    heads: list[tuple[int, ...]] = []
    tails: list[tuple[int, ...]] = []
    for spec in specs:
        width = _width(spec)
        if width:
            heads += [(*spec.shape[:-2], 1, spec.shape[-1]), spec.shape]
            tails += [spec.shape] * (width - 1)
        else:
            heads.append((spec.nbytes,))
    return heads, tails


def _allocate(shapes: Sequence[tuple[int, ...]]) -> tuple[memoryview, list[torch.Tensor]]:
    """One buffer, and tensors of these shapes that lie in it one behind the other."""
    buffer = torch.empty(sum(map(_size, shapes)), dtype=torch.uint8).numpy().data
    specs = [TensorSpec(str(n), "uint8", shape) for n, shape in enumerate(shapes)]
    return buffer, list(views(buffer, specs).values())


def _condition(exponents: torch.Tensor, base: torch.Tensor) -> None:
    """Find each channel's typical exponent and take it off."""
    step = max(1, exponents.shape[-2] // SAMPLE)
    typical = exponents[..., ::step, :].float().mean(dim=-2, keepdim=True).round_()
    base.copy_(typical)
    exponents.sub_(base)


def _split16(
    tensor: torch.Tensor, base: torch.Tensor, exponents: torch.Tensor, planes: list[torch.Tensor]
) -> None:
    bits = tensor.view(torch.int16)
    exponents.copy_(bits >> 7)  # the cast keeps the low byte
    _condition(exponents, base)
    planes[0].copy_((bits & 0x7F).bitwise_or_((bits >> 8).bitwise_and_(0x80)))


def _merge16(out: torch.Tensor, exponents: torch.Tensor, planes: list[torch.Tensor]) -> None:
    bits = out.view(torch.int16)
    bits.copy_(planes[0].view(torch.int8))  # extends the sign
    bits.bitwise_and_(-0x7F81)  # 0x807f
    bits.bitwise_or_(exponents.to(torch.int16).bitwise_left_shift_(7))


def _split32(
    tensor: torch.Tensor, base: torch.Tensor, exponents: torch.Tensor, planes: list[torch.Tensor]
) -> None:
    bits = tensor.view(torch.int32)
    exponents.copy_(bits >> 23)
    _condition(exponents, base)
    planes[0].copy_(((bits >> 16) & 0x7F).bitwise_or_((bits >> 24).bitwise_and_(0x80)))
    planes[1].copy_(bits >> 8)
    planes[2].copy_(bits)


def _merge32(out: torch.Tensor, exponents: torch.Tensor, planes: list[torch.Tensor]) -> None:
    bits = out.view(torch.int32)
    bits.copy_(planes[0])
    bits.bitwise_and_(0x7F).bitwise_left_shift_(16)
    bits.bitwise_or_((planes[0].to(torch.int32) & 0x80) << 24)
    bits.bitwise_or_(exponents.to(torch.int32).bitwise_left_shift_(23))
    bits.bitwise_or_(planes[1].to(torch.int32).bitwise_left_shift_(8)).bitwise_or_(planes[2])
