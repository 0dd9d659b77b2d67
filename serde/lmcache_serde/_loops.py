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


@_compiled("void(u2[:,:,::1], i8, i8, u1[:,:,::1])")
def base(values: Array, sample: int, below: int, out: Array) -> None:
    """Fill `out` with the rounded mean of about `sample` tokens' exponents, less `below`."""
    rows, tokens, channels = values.shape
    step = max(1, tokens // sample)
    count = (tokens + step - 1) // step
    total = np.empty(channels, uint16)
    for r in range(rows):
        total[:] = 0
        for t in range(0, tokens, step):
            for c in range(channels):
                total[c] += uint16(_exponent(values[r, t, c]))
        for c in range(channels):
            mean, rest = divmod(int(total[c]), count)
            up = 2 * rest > count or (2 * rest == count and mean & 1)  # a half: to what is even
            out[r, 0, c] = uint8(mean + up - below)


@_compiled()
def _split_two(
    values: Array, base: Array, codes: Array, noise: Array, r: int, t: int, two: int
) -> uint8:
    """Fill the noise of tokens `t` and `two` and their codes; returns the highest of those. Of an
    odd number of tokens the last has none beside it: then it is both."""
    most, beside = uint8(0), uint8(15 * (two > t))
    for c in range(values.shape[2]):
        one, other = _code(values[r, t, c], base[r, 0, c]), _code(values[r, two, c], base[r, 0, c])
        noise[r, t, c], noise[r, two, c] = _noise(values[r, t, c]), _noise(values[r, two, c])
        codes[r, t >> 1, c] = uint8(one | uint8((other & beside) << uint8(4)))
        most = max(most, max(one, other))
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
        for t in range(0, tokens, 2):
            two = min(t + 1, tokens - 1)
            if _split_two(values, base, codes, noise, r, t, two) < 15:
                continue
            for place in range(t, two + 1):
                for c in range(channels):
                    value = values[r, place, c]
                    if _code(value, base[r, 0, c]) == 15:
                        if count == len(gaps):
                            return -1
                        here = (r * tokens + place) * channels + c
                        gaps[count], exponents[count] = here - last, _exponent(value)
                        count, last = count + 1, here
    return count


@_compiled("b1(u1[:,:,::1], u1[:,:,::1], i4[::1], u1[::1], u1[:,:,::1], u2[:,:,::1])")
def merge(
    codes: Array, base: Array, gaps: Array, exponents: Array, noise: Array, values: Array
) -> bool:
    """Fill `values`; False where a gap leads out of them."""
    rows, tokens, channels = values.shape
    for r in range(rows):
        for t in range(0, tokens, 2):
            two = min(t + 1, tokens - 1)
            for c in range(channels):
                code, low = codes[r, t >> 1, c], base[r, 0, c]
                values[r, two, c] = _value(code >> uint8(4), low, noise[r, two, c])
                values[r, t, c] = _value(code & uint8(15), low, noise[r, t, c])  # last: may be both
    flat, place = values.reshape(-1), 0
    for n in range(len(gaps)):
        place += gaps[n]
        if not 0 <= place < len(flat):
            return False
        flat[place] = flat[place] & uint16(0x807F) | uint16(exponents[n]) << uint16(7)
    return True
