"""What byteplane does to each number of bfloat16, as loops that numba compiles.

An operation on tensors reads and writes memory once for each step of the arithmetic; these touch
it once. Importing this fails where numba is missing or does not fit: byteplane does without it.
Arrays are C-contiguous: values uint16 and noise uint8 [rows, tokens, channels], base uint8
[rows, 1, channels], codes uint8 [rows, tokens / 2 rounded up, channels].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy import uint8, uint16

njit: Any = numba.njit  # what its types are differs between versions
Array = np.ndarray[Any, np.dtype[Any]]
Function = TypeVar("Function", bound=Callable[..., Any])


def _compiled(*signature: str) -> Callable[[Function], Function]:
    """Compile for this CPU, at once where a signature is given, and without Python's lock."""

    def compiled(function: Function) -> Function:
        try:
            done: Function = njit(*signature, nogil=True, cache=True)(function)
        except RuntimeError:  # no directory to keep it in: compile for this process
            done = njit(*signature, nogil=True)(function)
        return done

    return compiled


# Each step says its width: numba would compute in 64 bits, and a vector of a CPU hold an eighth.


@_compiled()
def _noise(value: uint16) -> uint8:
    return uint8(value >> uint16(8)) & uint8(0x80) | uint8(value) & uint8(0x7F)


@_compiled()
def _exponent(value: uint16) -> uint8:
    return uint8(value >> uint16(7))


@_compiled()
def _code(value: uint16, base: uint8) -> uint8:
    return min(uint8(_exponent(value) - base), uint8(15))


@_compiled()
def _value(code: uint8, base: uint8, noise: uint8) -> uint16:
    exponent = uint16(uint8(code + base)) << uint16(7)
    sign = uint16(noise & uint8(0x80)) << uint16(8)
    return uint16(sign | exponent | uint16(noise & uint8(0x7F)))


@_compiled()
def _split_token(value: Array, base: Array, code: Array, noise: Array, odd: int) -> uint8:
    """Fill the noise of a token and its half of the codes; returns the highest code."""
    for c in range(len(value)):
        noise[c] = _noise(value[c])
    if odd:
        for c in range(len(value)):
            code[c] |= uint8(_code(value[c], base[c]) << uint8(4))
    else:
        for c in range(len(value)):
            code[c] = _code(value[c], base[c])
    most = uint8(0)
    for c in range(len(value)):
        most = max(most, _code(value[c], base[c]))
    return most


@_compiled("i8(u2[:,:,::1], u1[:,:,::1], u1[:,:,::1], u1[:,:,::1], i4[::1], u1[::1])")
def split(
    values: Array, base: Array, codes: Array, noise: Array, gaps: Array, exponents: Array
) -> int:
    """Fill all but `values` and `base`; returns how many of `gaps` and `exponents` were taken, -1
    where there are too few."""
    rows, tokens, channels = values.shape
    count = last = 0
    for r in range(rows):
        low = base[r, 0]
        for t in range(tokens):
            value = values[r, t]
            if _split_token(value, low, codes[r, t >> 1], noise[r, t], t & 1) < 15:
                continue
            for c in range(channels):
                if _code(value[c], low[c]) == 15:
                    if count == len(gaps):
                        return -1
                    place = (r * tokens + t) * channels + c
                    gaps[count], exponents[count] = place - last, _exponent(value[c])
                    count, last = count + 1, place
    return count


@_compiled("b1(u1[:,:,::1], u1[:,:,::1], i4[::1], u1[::1], u1[:,:,::1], u2[:,:,::1])")
def merge(
    codes: Array, base: Array, gaps: Array, exponents: Array, noise: Array, values: Array
) -> bool:
    """Fill `values`; False where a gap leads out of them."""
    rows, tokens, channels = values.shape
    for r in range(rows):
        low = base[r, 0]
        for t in range(tokens):
            code, rest, value = codes[r, t >> 1], noise[r, t], values[r, t]
            if t & 1:
                for c in range(channels):
                    value[c] = _value(code[c] >> uint8(4), low[c], rest[c])
            else:
                for c in range(channels):
                    value[c] = _value(code[c] & uint8(15), low[c], rest[c])
    flat, place = values.reshape(-1), 0
    for n in range(len(gaps)):
        place += gaps[n]
        if not 0 <= place < len(flat):
            return False
        flat[place] = flat[place] & uint16(0x807F) | uint16(exponents[n]) << uint16(7)
    return True
