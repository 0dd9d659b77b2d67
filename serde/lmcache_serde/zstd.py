"""zstd: general lossless compression of the payload."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import zstandard
from pydantic import Field

from lmcache_core.serde import Buffers, BytesToBytes, Options, concat

BLOCK = 128 << 10
"""The most that a zstd block holds."""
SMALL = 16 << 10
"""A part of at least this many bytes has blocks of its own; smaller ones share the next part's."""
GAIN = 0.01
"""Least relative saving: what a sample shrinks by less is stored as it is."""
BLOCKS = 4096
"""A payload has at most so many blocks, and one more for each KiB of content."""
WINDOW = 8 << 20
"""Bytes that any decoder should take for a window (RFC 8878, 3.1.1.1.2)."""
_STORED = struct.Struct("<II")
"""Before what is stored as it is, as a skippable frame begins: magic number, size."""
_SKIPPABLE = 0x184D2A50


class ZstdOptions(Options):
    """`level`: 1 (fast) to 22 (small).

    Level 1 hardly searches for repetitions. KV has few, and one that is found by chance takes
    bytes out of the statistics that the rest is coded with: behind `byteplane` it costs 2 % of
    size and half the speed.
    """

    level: int = Field(default=1, ge=1, le=22)


def _parameters(level: int) -> zstandard.ZstdCompressionParameters:
    if level == 1:
        return zstandard.ZstdCompressionParameters(compression_level=1, hash_log=6, min_match=7)
    return zstandard.ZstdCompressionParameters.from_level(level)


class Zstd(BytesToBytes):
    """zstd frames (RFC 8878) that follow each other and state their content sizes.

    At level 1, what looks like noise goes between them as it is, in skippable frames: it is copied
    neither here nor by decoding, which takes a fifth less time for that.
    """

    name = "zstd"
    Options = ZstdOptions

    def encode(self, parts: Buffers, context: bytes) -> list[memoryview]:
        parts = [part for part in parts if part.nbytes] or [memoryview(b"")]
        out: list[memoryview] = []
        for noise, group in groupby(parts, self._is_noise):
            write = _stored if noise else self._compressed
            out += write(list(group))
        return out

    def _is_noise(self, part: memoryview) -> bool:
        if self.options.level > 1 or part.nbytes < BLOCK:
            return False
        step = part.nbytes // 16
        sample = b"".join(part[n * step : n * step + BLOCK // 64] for n in range(16))
        packed = b"".join(self._compressed([memoryview(sample)]))
        return len(packed) > len(sample) * (1 - GAIN)

    def _compressed(self, parts: Sequence[memoryview]) -> list[memoryview]:
        size = sum(part.nbytes for part in parts)
        # A compressor is not thread-safe; making one is cheap beside a chunk.
        compressor = zstandard.ZstdCompressor(compression_params=_parameters(self.options.level))
        stream = compressor.compressobj(size=size)
        out: list[bytes] = []
        for part in parts:
            out.append(stream.compress(part))
            if part.nbytes >= SMALL:  # each in blocks of its own: statistics differ
                out.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        out.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH))
        return [memoryview(piece) for piece in out if piece]

    def decode(
        self,
        parts: Buffers,
        context: bytes,
        allocate: Callable[[int], memoryview],
        limit: int,
    ) -> list[memoryview]:
        frames = [(frame, _size(frame)) for frame in _frames(concat(parts), limit)]
        sizes = [size for _, size in frames]
        if min(sizes) < 0 or sum(sizes) > limit:
            raise ValueError(f"states {sum(sizes)} bytes of content; at most {limit} can be")
        room = allocate(sum(size for frame, size in frames if not _is_stored(frame)))
        # One for all: making one costs 9 us.
        decompressor = zstandard.ZstdDecompressor(max_window_size=max(WINDOW, limit))
        out: list[memoryview] = []
        for frame, size in frames:
            if _is_stored(frame):
                out.append(frame[_STORED.size :])
                continue
            out.append(room[:size])
            _decompress(decompressor.stream_reader(frame), out[-1])
            room = room[size:]
        return out


def _stored(parts: Sequence[memoryview]) -> list[memoryview]:
    """A skippable frame for each."""
    heads = [memoryview(_STORED.pack(_SKIPPABLE, part.nbytes)) for part in parts]
    return [piece for frame in zip(heads, parts, strict=True) for piece in frame]


def _is_stored(frame: memoryview) -> bool:
    return frame[:4] == _SKIPPABLE.to_bytes(4, "little")


def _size(frame: memoryview) -> int:
    """Bytes of a frame's content; -1 where it does not state them."""
    if _is_stored(frame):
        return frame.nbytes - _STORED.size
    return zstandard.frame_content_size(frame)


def _frames(payload: memoryview, limit: int) -> Iterator[memoryview]:
    """Each frame, of which there is at least one."""
    start, blocks = 0, BLOCKS + (limit >> 10)
    while start < payload.nbytes or not start:
        nbytes, count = _extent(payload[start:], blocks)
        blocks -= count
        if blocks < 0:
            raise ValueError("more blocks than content")
        if start + nbytes > payload.nbytes:
            raise ValueError("ends within a frame")
        yield payload[start : start + nbytes]
        start += nbytes


def _extent(payload: memoryview, most: int) -> tuple[int, int]:
    """Bytes of the frame that `payload` begins with, or more than are there, and its blocks, of
    which there are at most so many."""
    if _is_stored(payload):
        return _STORED.size + int.from_bytes(payload[4 : _STORED.size], "little"), 1
    offset = zstandard.frame_header_size(payload)
    last, count = False, 0
    while not last and offset < payload.nbytes:
        header = int.from_bytes(payload[offset : offset + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        offset += 3 + (1 if kind == 1 else size)  # 1: one byte, many times
        count += 1
        if count > most:
            raise ValueError("more blocks than content")
    return (offset if last else payload.nbytes + 1), count


def _decompress(reader: zstandard.ZstdDecompressionReader, out: memoryview) -> None:
    filled = 0
    while filled < out.nbytes:
        n = reader.readinto(out[filled:])
        if n == 0:
            raise ValueError(f"ends after {filled} of {out.nbytes} bytes")
        filled += n
    if reader.read(1):
        raise ValueError("content goes on beyond its stated size")
