"""byteplane: lossless; sorts the bits of floats so that a general compressor finds what repeats.

    serde: [byteplane, zstd]        # about 1.5x for bf16, where zstd alone has 1.27x

Signs and mantissas of KV are noise. Exponents are not: those of one channel are nearly the same
for every token. So a tensor [..., tokens, channels] is written as

    base            a byte a channel: its typical exponent, less BELOW
    codes           each exponent, less its channel's base, in four bits; two tokens that follow
                    each other share a byte
    noise           planes of bytes: sign and upper mantissa, then the rest of the mantissa
    gaps, values    where an exponent has no code (distance from the last such one), and the
                    exponent

first base and codes of all tensors, then all noise, so that a compressor stores whole blocks of it
as they are. Half as many symbols as exponents are coded in half the time, and a symbol tells what
two tokens have in common. In front of it all stands, for each tensor, how many exponents have no
code, or -1 where so many had none that each takes a byte; with float16 each does, for behind the
five bits of its exponent other bits stand. Tensors that hold no floats of 16 or 32 bits are
written unchanged.

Splitting exponents from mantissas is the idea of ZipNN (Hershcovitch et al. 2024,
arXiv:2411.05239); taking channel and neighbour into account is what goes beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lmcache_core.serde import (
    DTYPES,
    Buffers,
    Tensors,
    TensorSpec,
    TensorsToBytes,
    byte_array,
    byte_view,
    pooled_empty,
    split_at,
)

SAMPLE = 32
"""Tokens that the typical exponent is the mean of."""
SLICE = 1 << 20
"""Bytes taken at a time, so that what is made of them on the way stays in a core's cache."""
BELOW = 8
"""Codes for exponents below the typical one: more than above it, as exponents are distributed."""
ESCAPE = 15
"""The code of all exponents that have none of their own."""
RARE = 16
"""With more than one of them in so many exponents, bytes are smaller."""
_FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}
_SECTIONS = (("base", "codes"), ("noise",), ("gaps", "values"))
_CPU = torch.device("cpu")
# Numbers as tensors: of any other, an operation on tensors first makes one, each time.
_LOW = torch.tensor(15, dtype=torch.uint8, device=_CPU)
_NIBBLE = torch.tensor(4, dtype=torch.uint8, device=_CPU)
_MANTISSA = torch.tensor(7, dtype=torch.int16, device=_CPU)
_BYTE = torch.tensor(8, dtype=torch.int16, device=_CPU)
_NOISE = torch.tensor(-0x7F81, dtype=torch.int16, device=_CPU)  # sign, upper mantissa: 0x807f

_Array = np.ndarray[Any, np.dtype[Any]]
_Pieces = dict[str, torch.Tensor]
"""What a tensor is written as, by the names above."""
_Arrays = dict[str, _Array]
"""The same, as it is read: making a tensor of memory takes several times as long."""


class BytePlane(TensorsToBytes):
    """Of a bf16 tensor's bytes about 3/4 are left, and one byte for each channel of a head; never
    more than all, and those."""

    name = "byteplane"
    keeps_input = True

    def encode(self, tensors: Tensors) -> list[memoryview]:
        pieces = [_split(tensor) for tensor in tensors.values()]
        parts = [p[name] for names in _SECTIONS for p in pieces for name in names if name in p]
        counts = [p["gaps"].numel() if "gaps" in p else -1 for p in pieces]
        return [memoryview(np.array(counts, "<i4").tobytes()), *byte_view(parts)]

    def decode(self, parts: Buffers, specs: Sequence[TensorSpec]) -> Tensors:
        head, parts = split_at(parts, 4 * len(specs))
        counts = np.frombuffer(head, "<i4").tolist()
        shapes = [_shapes(*pair) for pair in zip(specs, counts, strict=True)]
        read: list[_Arrays] = [{} for _ in specs]
        for names in _SECTIONS:
            for shape, arrays in zip(shapes, read, strict=True):
                for name in names:
                    if name in shape:
                        arrays[name], parts = _take(parts, *shape[name])
        if any(part.nbytes for part in parts):
            raise ValueError("goes on beyond its last piece")
        return {spec.name: _merge(spec, arrays) for spec, arrays in zip(specs, read, strict=True)}


def _take(parts: Buffers, dtype: str, shape: tuple[int, ...]) -> tuple[_Array, Buffers]:
    """An array that `parts` begin with, and what follows."""
    piece, rest = split_at(parts, math.prod(shape) * np.dtype(dtype).itemsize)
    array: _Array = byte_array(piece)
    if dtype != "uint8":  # they may lie at any offset
        array = array.copy().view(dtype)
    return array.reshape(shape), rest


def _width(spec: TensorSpec) -> int:
    """Bytes of a float that is split; 0 for what is not."""
    return _FLOATS.get(spec.dtype, 0) if len(spec.shape) >= 2 else 0


def _rows(shape: Sequence[int]) -> tuple[int, int, int]:
    """[rows, tokens, channels]: a row is a head of a layer."""
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _shapes(spec: TensorSpec, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes of a tensor's pieces; `count` as the payload begins with."""
    width = _width(spec)
    if not width:
        return {"codes": ("uint8", (spec.nbytes,))}
    rows, tokens, channels = _rows(spec.shape)
    if count > rows * tokens * channels // RARE:
        raise ValueError(f"{count} exponents without a code: more than are written so")
    coded = tokens if count < 0 else -(-tokens // 2)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "base": ("uint8", (rows, 1, channels)),
        "codes": ("uint8", (rows, coded, channels)),
        "noise": ("uint8", (width - 1, rows, tokens, channels)),
    }
    if count >= 0:
        shapes |= {"gaps": ("int32", (count,)), "values": ("uint8", (count,))}
    return shapes


def _slices(values: torch.Tensor) -> list[slice]:
    """Of rows, each of about SLICE bytes."""
    if not values.numel():
        return []
    step = max(1, SLICE // values[0].nbytes)
    return [slice(start, start + step) for start in range(0, len(values), step)]


def _split(tensor: torch.Tensor, *, pack: bool = True) -> _Pieces:
    spec = TensorSpec.of("", tensor)
    if not _width(spec):
        return {"codes": tensor.reshape(-1).view(torch.uint8)}
    pack = pack and spec.dtype != "float16"
    shapes = _shapes(spec, 0 if pack else -1)
    pieces = {n: pooled_empty(shape, DTYPES[t], _CPU) for n, (t, shape) in shapes.items()}
    pieces["base"].zero_()
    values = tensor.view(_rows(spec.shape))
    room = values.numel() // RARE
    offsets, exponents = [], []
    slices = _slices(values)
    for rows, work in zip(slices, _work(values, slices), strict=True):
        _noise(values[rows], pieces["noise"][:, rows], work)
        _exponents(values[rows], pieces["base"][rows], work)
        if not pack:
            pieces["codes"][rows] = work.codes
            continue
        where = _escape(work)
        room -= len(where)
        if room < 0:
            return _split(tensor, pack=False)
        exponents.append(work.exponents.numpy().reshape(-1)[where])
        offsets.append(where + rows.start * values[0].numel())
        _pack(pieces["codes"][rows], work.codes)
    if offsets:
        gaps = np.diff(np.concatenate(offsets), prepend=0).astype(np.int32)
        pieces["gaps"] = torch.from_numpy(gaps)
        pieces["values"] = torch.from_numpy(np.concatenate(exponents))
    return pieces


class _Work(NamedTuple):
    """Memory for what is made of a slice on the way. It is of the pool: what malloc hands out
    above some size has its pages faulted in each time, at several times the cost of the work."""

    both: torch.Tensor
    """Of 32 bits, over `high` and `wide`."""
    high: torch.Tensor
    wide: torch.Tensor
    exponents: torch.Tensor
    codes: torch.Tensor
    mask: torch.Tensor


def _work(values: torch.Tensor, slices: Sequence[slice]) -> Iterator[_Work]:
    """The same memory for each slice, of its length."""
    if not slices:
        return
    shape = values[slices[0]].shape
    size = shape.numel()
    room = pooled_empty((6 * size,), torch.uint8, _CPU)
    both = room[: 4 * size].view(torch.int32).view(shape)
    high, wide = room[: 4 * size].view(torch.int16).view(2, *shape)
    exponents, codes = room[4 * size :].view(2, *shape)
    mask = room[:size].view(torch.bool).view(shape)  # by then nobody looks at `high`
    work = _Work(both, high, wide, exponents, codes, mask)
    yield from [work] * (len(slices) - 1)
    rest = len(values) - slices[-1].start
    yield _Work(*(tensor[:rest] for tensor in work))


def _high(values: torch.Tensor, work: _Work) -> torch.Tensor:
    """The upper half of each number."""
    if values.dtype != torch.float32:
        return values.view(torch.int16)
    return work.high.copy_(values.view(torch.int32) >> 16)


def _noise(values: torch.Tensor, out: torch.Tensor, work: _Work) -> None:
    if values.dtype == torch.float32:
        bits = values.view(torch.int32)
        out[1].copy_(bits >> 8)  # the cast keeps the low byte
        out[2].copy_(bits)
    torch.bitwise_and(_high(values, work), _NOISE, out=work.wide)
    torch.bitwise_right_shift(work.wide, _BYTE, out=work.high)
    out[0].copy_(work.high.bitwise_or_(work.wide))


def _exponents(values: torch.Tensor, base: torch.Tensor, work: _Work) -> None:
    """Fill `base`, the exponents, and as codes how far they are above it, modulo 256."""
    torch.bitwise_right_shift(_high(values, work), _MANTISSA, out=work.wide)
    exponents = work.exponents.copy_(work.wide)
    _base(base, _sample(exponents))
    torch.sub(exponents, base, out=work.codes)


def _sample(values: torch.Tensor) -> torch.Tensor:
    """Of [rows, tokens, channels], about SAMPLE tokens."""
    return values[:, :: max(1, values.shape[1] // SAMPLE)]


def _base(out: torch.Tensor, exponents: torch.Tensor) -> None:
    """A channel's base, from some of its exponents."""
    out.copy_(exponents.float().mean(dim=1, keepdim=True).round_().to(torch.int16) - BELOW)


def _escape(work: _Work) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Make codes of four bits; returns the offsets where they do not tell the exponent."""
    codes = work.codes.clamp_(max=ESCAPE).numpy()
    eights = np.packbits(np.equal(codes, ESCAPE, out=work.mask.numpy()))
    some = np.flatnonzero(eights != 0)  # few, which shortens the search
    which, bit = np.nonzero(np.unpackbits(eights[some]).reshape(-1, 8))
    return some[which] * 8 + bit


def _merge(spec: TensorSpec, arrays: _Arrays) -> torch.Tensor:
    dtype = DTYPES[spec.dtype]
    if "base" not in arrays:
        codes = arrays["codes"]
        aligned = codes if codes.ctypes.data % dtype.itemsize == 0 else codes.copy()
        return torch.from_numpy(aligned).view(dtype).view(spec.shape)
    out = pooled_empty(spec.shape, dtype, _CPU)
    values = out.view(_rows(spec.shape))
    _merge_slices(values, {name: torch.from_numpy(array) for name, array in arrays.items()})
    if "gaps" in arrays:
        _put_exponents(out, arrays["gaps"].cumsum(), arrays["values"])
    return out


def _merge_slices(values: torch.Tensor, pieces: _Pieces) -> None:
    wide = values.dtype == torch.float32
    slices = _slices(values)
    for rows, work in zip(slices, _work(values, slices), strict=True):
        codes = pieces["codes"][rows]
        if "gaps" in pieces:
            codes = _unpack(work.codes, codes)
        work.wide.copy_(torch.add(codes, pieces["base"][rows], out=work.codes))
        part, noise = values[rows], pieces["noise"][:, rows]
        high = work.high if wide else part.view(torch.int16)
        high.copy_(noise[0].view(torch.int8))  # extends the sign
        high.bitwise_and_(_NOISE).add_(work.wide, alpha=128)
        if wide:
            _widen(part.view(torch.int32), high, noise[1:], work.both)


def _widen(out: torch.Tensor, high: torch.Tensor, noise: torch.Tensor, low: torch.Tensor) -> None:
    """Floats of 32 bits from their upper half and the two planes of the lower one. `low` is
    memory of as many bits; it may be that of `high`."""
    out.copy_(high)
    for plane in noise:
        out.bitwise_left_shift_(8)
        out.bitwise_or_(low.copy_(plane))


def _put_exponents(
    out: torch.Tensor, offsets: np.ndarray[Any, Any], exponents: np.ndarray[Any, Any]
) -> None:
    """Write those that have no code."""
    wide = out.dtype == torch.float32
    integer, shift = (torch.int32, 23) if wide else (torch.int16, 7)
    bits = out.view(integer).view(-1).numpy()
    bits[offsets] = bits[offsets] & ~(0xFF << shift) | exponents.astype(bits.dtype) << shift


def _pack(out: torch.Tensor, codes: torch.Tensor) -> None:
    """[rows, tokens, channels] to [rows, tokens / 2, channels]; a missing last one is 0."""
    odd = codes[:, 1::2]
    out.copy_(codes[:, ::2])
    out[:, : odd.shape[1]].add_(odd, alpha=16)


def _unpack(out: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    odd = out[:, 1::2]
    torch.bitwise_and(packed, _LOW, out=out[:, ::2])
    torch.bitwise_right_shift(packed[:, : odd.shape[1]], _NIBBLE, out=odd)
    return out
