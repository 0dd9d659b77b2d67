"""zstd: general lossless compression of the payload."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import zstandard
from pydantic import Field

from lmcache_core import BytesToBytes, Options


class ZstdOptions(Options):
    """`level`: 1 (fast) to 22 (small)."""

    level: int = Field(default=1, ge=1, le=22)


class Zstd(BytesToBytes):
    """One zstd frame that states its content size."""

    name = "zstd"
    Options = ZstdOptions

    def encode(self, parts: Sequence[memoryview], context: bytes) -> list[memoryview]:
        size = sum(part.nbytes for part in parts)
        # A compressor is not thread-safe; making one is cheap beside a chunk.
        stream = zstandard.ZstdCompressor(level=self.options.level).compressobj(size=size)
        out = [stream.compress(part) for part in parts] + [stream.flush()]
        return [memoryview(part) for part in out if part]

    def decode(
        self,
        payload: memoryview,
        context: bytes,
        allocate: Callable[[int], memoryview],
        limit: int,
    ) -> memoryview:
        size = zstandard.frame_content_size(payload)
        if not 0 <= size <= limit:
            raise ValueError(f"states {size} bytes of content; at most {limit} can be")
        out = allocate(size)
        reader = zstandard.ZstdDecompressor().stream_reader(payload, read_across_frames=False)
        filled = 0
        while filled < size:
            n = reader.readinto(out[filled:])
            if n == 0:
                raise ValueError(f"ends after {filled} of {size} bytes")
            filled += n
        if reader.read(1):
            raise ValueError("content goes on beyond its stated size")
        return out
