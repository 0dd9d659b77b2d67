"""Memory: what is remembered of evicted chunks, four bytes each.

A bucket of 8 words for each key, filled in turn. A word is 16 bits of the key, 5 bits for the
owner, and 11 for when it was written. A key is taken for another once in 8,000 times, which costs
a wrong guess of its worth.
"""

from __future__ import annotations

import struct
from array import array

BUCKET = 8
_PARTS = struct.Struct("<HQ")  # the end of a key: bits of a cryptographic hash
_TIME_BITS = 11
_PERIOD = 1 << _TIME_BITS
_UNITS = 64
"""Parts of a store's length that the time of a word is told in."""


class Memory:
    """The last `lengths` times `chunks` evicted chunks, nearly all of them."""

    def __init__(self, chunks: int, lengths: int) -> None:
        self.chunks = chunks
        self._oldest = lengths * _UNITS
        self._buckets = max(1, chunks * lengths // BUCKET)
        self._marks = array("H", bytes(2 * BUCKET * self._buckets))
        self._words = array("H", bytes(2 * BUCKET * self._buckets))
        self._turn = bytearray(self._buckets)
        self._written = 0
        self._time = 0

    def remember(self, key: bytes, what: int) -> None:
        """Note 5 bits for a key."""
        mark, number = _PARTS.unpack_from(key, 22)
        bucket = number % self._buckets
        turn = self._turn[bucket]
        self._turn[bucket] = turn + 1 & BUCKET - 1
        at = BUCKET * bucket + turn
        self._marks[at] = mark | 1
        self._words[at] = what << _TIME_BITS | self._time
        self._written += _UNITS
        if self._written >= self.chunks:
            self._time = (self._time + self._written // self.chunks) % _PERIOD
            self._written %= self.chunks

    def recall(self, key: bytes) -> int | None:
        """What was noted, once, if it is not too long ago."""
        mark, number = _PARTS.unpack_from(key, 22)
        begin = number % self._buckets * BUCKET
        mark |= 1
        if mark not in self._marks[begin : begin + BUCKET]:
            return None
        at = self._marks.index(mark, begin)
        self._marks[at] = 0
        word = self._words[at]
        return word >> _TIME_BITS if (self._time - word) % _PERIOD <= self._oldest else None
