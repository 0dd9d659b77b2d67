"""Buffers: bytes as buffers that follow each other, so that nobody has to copy them into one."""

from __future__ import annotations

from collections.abc import Sequence

Buffers = Sequence[memoryview]
"""Writers send the buffers of a frame as they are; readers get them however the bytes came."""


def nbytes_of(parts: Buffers) -> int:
    """Bytes of all of them."""
    return sum(part.nbytes for part in parts)


def concat(parts: Buffers) -> memoryview:
    """All of it as one buffer; a copy where more than one part holds something."""
    filled = [part for part in parts if part.nbytes]
    return filled[0] if len(filled) == 1 else memoryview(bytearray().join(filled))


def split_at(parts: Buffers, nbytes: int) -> tuple[memoryview, list[memoryview]]:
    """The first `nbytes` as one buffer, and what follows. Raises ValueError where there are
    fewer."""
    rest, head = list(parts), []
    while nbytes:
        if not rest:
            raise ValueError(f"ends {nbytes} bytes early")
        first = rest.pop(0)
        head.append(first[:nbytes])
        rest[:0] = [first[nbytes:]] if first.nbytes > nbytes else []
        nbytes -= head[-1].nbytes
    return concat(head), rest
