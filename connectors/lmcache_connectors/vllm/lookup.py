"""How far a prefix is stored: a question to the tiers, and what of the answer can be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lmcache_connectors.vllm.chunks import Group
from lmcache_core import ChunkKey
from lmcache_core.connector import Row, chunk_ends, longest


class Found(NamedTuple):
    """What of a prefix is stored."""

    tokens: int
    usable: int
    """Tokens that vLLM can use; it must have at least one of the prompt to compute."""
    ends: list[int]
    tiers: list[list[list[int]]]
    """By rank, group and chunk; anything for chunks that a sliding window has left."""


class Lookup:
    """Looks prefixes up over all groups of all ranks. Its methods may be called from any thread."""

    def __init__(
        self,
        ranks: Sequence[Sequence[Group]],
        where: Callable[[Sequence[ChunkKey]], Sequence[int | None]],
        *,
        chunk: int,
        hashed: int,
        unit: int,
    ) -> None:
        """`ranks`: each one's groups; with none, nothing is found. `where`: the tier that has each
        of these keys, if one has. `chunk`, `hashed`, `unit`: tokens of a chunk, of what a hash
        stands for, and of what a hit is a multiple of."""
        self._ranks, self._where = ranks, where
        self._chunk, self._hashed, self._unit = chunk, hashed, unit

    def find(self, hashes: Sequence[bytes], usable: int, salt: str) -> Found:
        """The longest prefix that every group of every rank has, as far as it needs it."""
        total = len(hashes) * self._hashed if self._ranks else 0
        total -= total % self._unit
        ends = chunk_ends(0, total, self._chunk)
        where = self._locate(hashes, ends, salt)
        count = self._longest(where, ends, usable)
        ends, last = ends[:count], ends[count : count + 1]
        shorter = range(count * self._chunk + self._unit, last[0], self._unit) if last else ()
        short = self._locate(hashes, shorter, salt)
        for n in reversed(range(len(shorter))):
            if all(row[n] is not None for rows in short for row in rows):
                ends.append(shorter[n])
                for rows, more in zip(where, short, strict=True):
                    for row, tail in zip(rows, more, strict=True):
                        row[count:] = [tail[n]]
                break
        tiers = [[[n or 0 for n in row[: len(ends)]] for row in rows] for rows in where]
        return Found(ends[-1] if ends else 0, usable, ends, tiers)

    def _locate(
        self, hashes: Sequence[bytes], ends: Sequence[int], salt: str
    ) -> list[list[list[int | None]]]:
        """Where the chunks are that end there, by rank, group and chunk; one question for all."""
        mine = [hashes[end // self._hashed - 1] for end in ends]
        keys = [key for groups in self._ranks for group in groups for key in group.keys(mine, salt)]
        found = iter(self._where(keys) if keys else ())
        return [[[next(found) for _ in ends] for _ in groups] for groups in self._ranks]

    def _longest(
        self, where: list[list[list[int | None]]], ends: Sequence[int], usable: int
    ) -> int:
        """How many chunks from the root on can be used."""
        rows = [
            Row(row, group.window, group.block)
            for groups, found in zip(self._ranks, where, strict=True)
            for group, row in zip(groups, found, strict=True)
        ]
        return longest(rows, ends, usable)
