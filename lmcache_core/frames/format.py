"""Format: how a frame lies in bytes.

    offset  size
    0       4     magic "LMCF"
    4       2     format version
    6       2     flags; bit 0: the checksum holds
    8       4     header length in bytes
    12      4     tokens in the chunk
    16      4     index of the chunk in its sequence
    20      8     payload length in bytes
    28      4     zero
    32      32    chunk key
    64      16    XXH3-128 of everything else: bytes 0..64, header, padding, payload
    80      ...   header: JSON {"pipeline": [[name, {option: value, ...}], ...],
                                "tensors": [[name, dtype, shape], ...],  as tensors-to-bytes
                                                                         sees them
                                "namespace": {...}}
    ...           zeros up to a multiple of 64
    ...           payload

All integers are little-endian. Magic, version and checksum stand there in every version, so that a
flipped bit of the version is damage, and only what a newer one wrote whole is "unreadable". The
header is the same for all chunks of one namespace, pipeline and length, so it is built and parsed
once. Its namespace must be that of the key that was asked for, whose digest it has: layout and
shapes follow from it, whoever wrote the frame.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import xxhash

from lmcache_core.errors import FrameError
from lmcache_core.frames.limits import MAX_HEADER_BYTES, MAX_STEPS, MAX_TENSORS, most_bytes
from lmcache_core.io.buffers import Buffers
from lmcache_core.kv.keys import ChunkKey
from lmcache_core.kv.layout import DTYPES, TensorSpec
from lmcache_core.kv.namespace import FRAME_VERSION, Namespace

MAGIC = b"LMCF"
PRELUDE = struct.Struct("<4sHHIIIQI32s")
CHECKSUM = PRELUDE.size
"""Where the checksum stands."""
HEADER = CHECKSUM + 16
"""Where the header begins."""
_ALIGN = 64
_SUMMED = 1

Step = tuple[str, str]
"""A serde's name and what a frame records of its options, as JSON."""


@dataclass(frozen=True, slots=True)
class Head:
    """The fixed fields."""

    magic: bytes
    version: int
    flags: int
    length: int
    tokens: int
    index: int
    nbytes: int
    zero: int
    key: bytes

    @classmethod
    def read(cls, parts: Buffers, *, verify: bool) -> Head:
        """The head of a whole frame, which lies within the first part. Raises FrameError."""
        first = parts[0] if parts else memoryview(b"")
        if first.nbytes < HEADER:
            raise FrameError(f"{first.nbytes} bytes are too few for a frame")
        head = cls(*PRELUDE.unpack_from(first))
        if head.magic != MAGIC:
            raise FrameError("not a frame")
        if verify and not head._sums_up(parts):
            raise FrameError("checksum does not match")
        if head.version != FRAME_VERSION:
            raise FrameError(f"frame version {head.version}; this is {FRAME_VERSION}", "unreadable")
        if head.length > MAX_HEADER_BYTES or head.zero or head.flags > _SUMMED:
            raise FrameError("impossible header")
        total = sum(part.nbytes for part in parts)
        if first.nbytes < head.payload or total != head.payload + head.nbytes:
            raise FrameError("wrong length: cut or extended")
        return head

    def _sums_up(self, parts: Buffers) -> bool:
        first = parts[0]
        found = bytes(first[CHECKSUM:HEADER])
        rest = [first[HEADER:], *parts[1:]]
        return self.summed and _checksum(first[:CHECKSUM], rest) == found

    @property
    def summed(self) -> bool:
        """Whether it has a checksum: what lies in memory of this host has none."""
        return bool(self.flags & _SUMMED)

    @property
    def payload(self) -> int:
        """Where the payload begins."""
        return payload_start(self.length)


class Header(NamedTuple):
    """What the JSON says, checked against the key and the limits."""

    steps: tuple[Step, ...]
    specs: tuple[TensorSpec, ...]
    namespace: Namespace
    limit: int
    """Bytes that the chunk may take at any step."""
    plain: bool
    """The specs are those of the layout, so that no serde changed the tensors."""


def payload_start(header: int) -> int:
    """Where the payload begins, behind a header of so many bytes."""
    end = HEADER + header
    return end + -end % _ALIGN


def write_head(
    key: ChunkKey,
    tokens: int,
    index: int,
    header: bytes,
    payload: Sequence[memoryview],
    *,
    checksum: bool,
) -> memoryview:
    """All that stands before the payload."""
    nbytes = sum(part.nbytes for part in payload)
    flags = _SUMMED if checksum else 0
    prelude = PRELUDE.pack(MAGIC, FRAME_VERSION, flags, len(header), tokens, index, nbytes, 0, key)
    padded = header + bytes(-(HEADER + len(header)) % _ALIGN)
    summed = _checksum(prelude, [memoryview(padded), *payload]) if checksum else bytes(16)
    return memoryview(prelude + summed + padded)


def _checksum(prelude: bytes | memoryview, parts: Sequence[memoryview]) -> bytes:
    state = xxhash.xxh3_128(prelude)
    for part in parts:
        state.update(part)
    return state.digest()


@lru_cache(maxsize=256)
def write_header(steps: tuple[Step, ...], specs: tuple[TensorSpec, ...], document: bytes) -> bytes:
    """The header's JSON; `document` is the namespace's."""
    pipeline = [(name, json.loads(options)) for name, options in steps]
    fields = {"pipeline": pipeline, "tensors": specs, "namespace": json.loads(document)}
    return json.dumps(fields, separators=(",", ":")).encode()


@lru_cache(maxsize=64)
def parse_header(raw: bytes, namespace: bytes, tokens: int) -> Header:
    """The header of a frame of `tokens` tokens in the namespace of that digest.

    Raises FrameError for whatever `write_header` does not write, or is beyond the limits.
    """
    try:
        fields = json.loads(raw)
        steps, specs = _steps(fields.pop("pipeline")), _specs(fields.pop("tensors"))
        document = json.dumps(fields.pop("namespace"), sort_keys=True, separators=(",", ":"))
        if fields:
            raise ValueError(f"unknown fields {list(fields)}")
        named = Namespace.from_document(document.encode())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FrameError(f"impossible header: {error!r}") from error
    if named.digest != namespace:
        raise FrameError("namespace document and key differ", "foreign")
    plain = named.layout.tensors(tokens)
    limit = most_bytes(sum(spec.nbytes for spec in plain))
    size = sum(spec.nbytes for spec in specs)
    if size > limit or len(specs) > MAX_TENSORS * len(plain):
        raise FrameError(f"{len(specs)} tensors of {size} bytes; at most {limit} can be")
    return Header(steps, specs, named, limit, sorted(specs) == sorted(plain))


def _steps(entries: Any) -> tuple[Step, ...]:
    if not (isinstance(entries, list) and 0 < len(entries) <= MAX_STEPS):
        raise ValueError(f"a pipeline has 1 to {MAX_STEPS} steps")
    for name, options in entries:
        if not (isinstance(name, str) and isinstance(options, dict)):
            raise ValueError("no step")
    return tuple((name, json.dumps(options, separators=(",", ":"))) for name, options in entries)


def _specs(entries: Any) -> tuple[TensorSpec, ...]:
    specs = tuple(_spec(*entry) for entry in entries)
    if len({spec.name for spec in specs}) < len(specs):
        raise ValueError("a tensor stands there twice")
    return specs


def _spec(name: object, dtype: object, shape: object) -> TensorSpec:
    if not (isinstance(name, str) and isinstance(dtype, str) and dtype in DTYPES):
        raise ValueError(f"no tensor: {name!r} of {dtype!r}")
    if not (isinstance(shape, list) and len(shape) <= 8):
        raise ValueError(f"no shape: {shape!r}")
    if not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise ValueError(f"no shape: {shape!r}")
    return TensorSpec(name, dtype, tuple(shape))
