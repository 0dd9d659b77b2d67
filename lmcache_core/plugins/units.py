"""Sizes, durations and paths as people write them."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, ValidationInfo

WRITTEN = "written"
"""In a validation's context: the values were written down by a person, in a file."""

_SIZES = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for suffix, base in (("ib", 1024), ("b", 1000))
}
_LARGEST = (1 << 63) - 1
"""Bytes that an operating system can count."""
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def _size(value: object) -> int:
    if isinstance(value, str):
        number, unit = _split(value)
        if unit in _SIZES:
            value = math.floor(number * _SIZES[unit])
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST:
        return value
    raise ValueError("expected a size such as 8GiB, 500MB or a number of bytes, above 0")


def _duration(value: object, info: ValidationInfo) -> float:
    written = isinstance(value, str) or bool(info.context and info.context.get(WRITTEN))
    number, unit = _split(str(value) if isinstance(value, str | int | float) else "")
    if written and unit == "" and number > 0:
        raise ValueError(f"expected a duration with its unit: {number:g}ms, {number:g}s or such")
    if isinstance(value, str) and unit in _SECONDS:
        value = number * _SECONDS[unit]
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ValueError("expected a duration such as 200ms, 1.5s or 2m, above 0")


def _split(text: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text)
    number = float(match[1]) if match else math.inf
    return (number, match[2].lower()) if match and number < math.inf else (0.0, "?")


def unquoted(text: str) -> str:
    """Without the blanks and the pair of quotes around it, which no shell took away."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return text


def _path(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = os.path.expanduser(unquoted(value).removeprefix("file://"))
    text = _VARIABLE.sub(_variable, text)
    if not text:
        raise ValueError("expected a path")
    if text.startswith("~"):
        raise ValueError("expected a path; there is no home of that name")
    if "$" in text:
        raise ValueError("expected a path; a $ in it is the start of a variable, $NAME or ${NAME}")
    try:
        if b"\0" in os.fsencode(text):
            raise ValueError
    except ValueError:
        raise ValueError("expected a path; no file can have that name") from None
    return text


def _variable(match: re.Match[str]) -> str:
    value = os.environ.get(match[1] or match[2])
    if not value:
        raise ValueError(f"expected a path; the environment variable in {match[0]} is not set")
    return value


Size = Annotated[int, BeforeValidator(_size)]
"""Bytes: an integer, or text such as 8GiB (1024-based) or 500MB (1000-based)."""

Duration = Annotated[float, BeforeValidator(_duration)]
"""Seconds: text such as 200ms, 1.5s, 2m; a number from Python, never from a file."""

LocalPath = Annotated[Path, BeforeValidator(_path)]
"""A path of this host: `~`, `$NAME` and `${NAME}` stand for what a shell makes of them, and quotes,
blanks and `file://` around it are left out. A Path from Python is what it is."""
