"""The longest prefix that an engine can use, over the chunks of all its layer groups and ranks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """The chunks of one layer group of one rank, from the root on."""

    tiers: Sequence[int | None]
    """For each chunk the tier that has it, or None."""
    window: int | None
    """Tokens that the group's layers attend to; None for all."""
    block: int
    """Tokens of one of the engine's blocks, which it keeps or forgets as a whole."""


def first_kept(tokens: int, window: int | None, block: int) -> int:
    """The first token whose block is still needed by what follows `tokens` tokens."""
    left = max(0, tokens - window + 1) if window else 0
    return left - left % block


def chunk_ends(begin: int, end: int, chunk: int) -> list[int]:
    """Where the chunks of `chunk` tokens end that hold the tokens [begin, end); the last one may
    be shorter."""
    return [*range(begin - begin % chunk + chunk, end, chunk), end] if begin < end else []


def longest(rows: Sequence[Row], ends: Sequence[int], usable: int) -> int:
    """How many chunks from the root on can be used.

    `ends`: tokens up to the end of each chunk. `usable`: tokens that the engine can use; it must
    compute at least one of the prompt. Groups that attend to everything need every chunk, those
    with a window only what it still reaches.
    """
    whole = [row.tiers for row in rows if row.window is None]
    count = min([_leading(tiers) for tiers in whole], default=len(ends))
    windows = [row for row in rows if row.window is not None]
    while count and not all(_reaches(row, ends, count, usable) for row in windows):
        count -= 1
    return count


def _leading(tiers: Sequence[int | None]) -> int:
    return next((n for n, tier in enumerate(tiers) if tier is None), len(tiers))


def _reaches(row: Row, ends: Sequence[int], count: int, usable: int) -> bool:
    kept = first_kept(min(ends[count - 1], usable), row.window, row.block)
    return None not in row.tiers[bisect_right(ends, kept) : count]
