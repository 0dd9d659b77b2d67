"""zstd: general lossless compression of the payload."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import zstandard
from pydantic import Field

from lmcache_core import BytesToBytes, Options

BLOCK = 128 << 10
"""The most that a zstd block holds."""
SMALL = 16 << 10
"""A part of at least this many bytes has blocks of its own; smaller ones share the next part's."""
GAIN = 0.01
"""Of what is made smaller by less, the time is better spent elsewhere."""
_STORED = b"\x28\xb5\x2f\xfd\xe0"
"""Magic number and the flags of a frame that states its content size in eight bytes."""


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

    At level 1, what looks like noise goes into a frame that stores it as it is, with no copy.
    """

    name = "zstd"
    Options = ZstdOptions

    def encode(self, parts: Sequence[memoryview], context: bytes) -> list[memoryview]:
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
        payload: memoryview,
        context: bytes,
        allocate: Callable[[int], memoryview],
        limit: int,
    ) -> memoryview:
        frames = list(_frames(payload))
        sizes = [zstandard.frame_content_size(frame) for frame in frames]
        if min(sizes) < 0 or sum(sizes) > limit:
            raise ValueError(f"states {sizes} bytes of content; at most {limit} can be")
        out = allocate(sum(sizes))
        decompressor = zstandard.ZstdDecompressor()  # for all: making one costs 9 us
        start = 0
        for frame, size in zip(frames, sizes, strict=True):
            _decompress(decompressor.stream_reader(frame), out[start : start + size])
            start += size
        return out


def _stored(parts: Sequence[memoryview]) -> list[memoryview]:
    """A frame of raw blocks, whose header is: last one, type in two bits, size in 21."""
    out = [memoryview(_STORED + struct.pack("<Q", sum(part.nbytes for part in parts)))]
    blocks = [part[n : n + BLOCK] for part in parts for n in range(0, part.nbytes, BLOCK)]
    for left, block in enumerate(reversed(blocks)):
        out[1:1] = [memoryview(struct.pack("<I", block.nbytes << 3 | (not left))[:3]), block]
    return out


def _frames(payload: memoryview) -> Iterator[memoryview]:
    """Each frame, of which there is at least one."""
    start = 0
    while start < payload.nbytes or not start:
        place = start + zstandard.frame_header_size(payload[start:])
        last = False
        while not last:
            header = int.from_bytes(payload[place : place + 3], "little")
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            place += 3 + (1 if kind == 1 else size)  # 1: one byte, many times
            if place > payload.nbytes:
                raise ValueError("ends within a block")
        yield payload[start:place]
        start = place


def _decompress(reader: zstandard.ZstdDecompressionReader, out: memoryview) -> None:
    filled = 0
    while filled < out.nbytes:
        n = reader.readinto(out[filled:])
        if n == 0:
            raise ValueError(f"ends after {filled} of {out.nbytes} bytes")
        filled += n
    if reader.read(1):
        raise ValueError("content goes on beyond its stated size")
