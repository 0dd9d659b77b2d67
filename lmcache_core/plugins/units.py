"""Sizes and durations as people write them."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator

_SIZES = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for suffix, base in (("ib", 1024), ("b", 1000))
}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def _size(value: object) -> int:
    if isinstance(value, str):
        number, unit = _split(value)
        if unit in _SIZES:
            value = math.floor(number * _SIZES[unit])
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError("expected a size such as 8GiB, 500MB or a number of bytes, above 0")


def _duration(value: object) -> float:
    if isinstance(value, str):
        number, unit = _split(value)
        if unit in _SECONDS:
            value = number * _SECONDS[unit]
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ValueError("expected a duration such as 200ms, 1.5s or a number of seconds, above 0")


def _split(text: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text)
    return (float(match[1]), match[2].lower()) if match else (0.0, "?")


Size = Annotated[int, BeforeValidator(_size)]
"""Bytes: an integer, or text such as 8GiB (1024-based) or 500MB (1000-based)."""

Duration = Annotated[float, BeforeValidator(_duration)]
"""Seconds: a number, or text such as 200ms, 1.5s, 2m."""
