"""Frame: the self-describing bytes of one chunk.

    offset  size
    0       4     magic "LMCF"
    4       2     format version
    6       2     flags; bit 0: sealed (the checksum holds)
    8       4     header length in bytes
    12      4     tokens in the chunk
    16      4     index of the chunk in its sequence
    20      8     payload length in bytes
    28      4     zero
    32      32    chunk key
    64      16    XXH3-128 of everything else: bytes 0..64, header, padding, payload
    80      ...   header: JSON {"chain": [[name, options], ...],
                                "tensors": [[name, dtype, shape], ...],  as tensors-to-bytes
                                                                         sees them
                                "namespace": {...}}
    ...           zeros up to a multiple of 64
    ...           payload

All integers are little-endian. The header is the same for all chunks of one namespace, chain and
length, so it is built and parsed once. Whatever is not exactly this is a FrameError.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import xxhash

from lmcache_core.errors import ConfigError, FrameError
from lmcache_core.frames.pipeline import Pipeline, Step
from lmcache_core.io.buffers import Buffers
from lmcache_core.kv.chunk import Chunk
from lmcache_core.kv.keys import ChunkKey
from lmcache_core.kv.layout import DTYPES, TensorSpec
from lmcache_core.kv.namespace import FRAME_VERSION, Namespace
from lmcache_core.serde import ChunkInfo

MAGIC = b"LMCF"
MAX_FRAME_BYTES = 4 << 30
"""No backend needs to read more for one frame; a larger one is damaged."""
_PRELUDE = struct.Struct("<4sHHIIIQI32s")
_CHECKSUM = _PRELUDE.size
_HEADER = _CHECKSUM + 16
_ALIGN = 64
_MAX_HEADER = 1 << 20
_SEALED = 1


class _Header(NamedTuple):
    chain: Pipeline
    specs: tuple[TensorSpec, ...]
    namespace: Namespace


def encode(chunk: Chunk, chain: Pipeline, *, seal: bool = True) -> list[memoryview]:
    """The frame of `chunk`: its head, then the payload's parts, not joined.

    `seal=False` leaves the checksum out, for memory that nobody else can change; such a frame
    never decodes with `verify=True`.
    """
    info = ChunkInfo(chunk.namespace.layout, chunk.tokens, chunk.index)
    tensors = chain.to_tensors(chunk.tensors, info)
    specs = tuple(TensorSpec.of(name, tensor) for name, tensor in tensors.items())
    header = _header_bytes(chain.spec, specs, chunk.namespace.document)
    context = _context(chunk.key, chunk.tokens, chunk.index, header)
    payload = chain.to_payload(tensors, context)
    prelude = _PRELUDE.pack(
        MAGIC,
        FRAME_VERSION,
        _SEALED if seal else 0,
        len(header),
        chunk.tokens,
        chunk.index,
        sum(part.nbytes for part in payload),
        0,
        chunk.key,
    )
    padded = header + bytes(-(_HEADER + len(header)) % _ALIGN)
    checksum = _checksum(prelude, [memoryview(padded), *payload]) if seal else bytes(16)
    return [memoryview(prelude + checksum + padded), *payload]


def decode(parts: Buffers, key: ChunkKey, *, verify: bool = True) -> Chunk:
    """The chunk whose frame lies in `parts` (the head within the first), which must be `key`'s.

    Tensors are views on the parts where the chain allows it. Raises FrameError, and nothing
    else, for bytes that are not that frame.
    """
    head = _Head.read(parts)
    if verify:
        head.check(parts)
    if head.key != key:
        raise FrameError(f"the frame of {head.key.hex()}", "foreign")
    raw_header = bytes(parts[0][_HEADER : _HEADER + head.length])
    header = _parse(raw_header, head.tokens)
    if header.namespace.digest != key.namespace:
        raise FrameError("namespace document and key differ", "foreign")
    info = ChunkInfo(header.namespace.layout, head.tokens, head.place)
    context = _context(key, head.tokens, head.place, raw_header)
    payload = [parts[0][head.start :], *parts[1:]]
    tensors = header.chain.decode(payload, header.specs, info, context)
    return Chunk(key, header.namespace, head.place, head.tokens, tensors)


class _Head(NamedTuple):
    """The fixed fields."""

    magic: bytes
    version: int
    flags: int
    length: int
    tokens: int
    place: int
    nbytes: int
    zero: int
    key: bytes

    @classmethod
    def read(cls, parts: Buffers) -> _Head:
        first = parts[0] if parts else memoryview(b"")
        if first.nbytes < _HEADER:
            raise FrameError(f"{first.nbytes} bytes are too few for a frame")
        head = cls(*_PRELUDE.unpack_from(first))
        if head.magic != MAGIC:
            raise FrameError("not a frame")
        if head.version != FRAME_VERSION:
            raise FrameError(f"frame version {head.version}; this is {FRAME_VERSION}", "unreadable")
        if head.length > _MAX_HEADER or head.zero or head.flags > _SEALED:
            raise FrameError("impossible header")
        total = sum(part.nbytes for part in parts)
        if first.nbytes < head.start or total != head.start + head.nbytes:
            raise FrameError("wrong length: cut or extended")
        return head

    @property
    def start(self) -> int:
        """Where the payload begins."""
        end = _HEADER + self.length
        return end + -end % _ALIGN

    def check(self, parts: Buffers) -> None:
        first = parts[0]
        expected = bytes(first[_CHECKSUM:_HEADER])
        sealed = self.flags & _SEALED
        if not sealed or _checksum(first[:_CHECKSUM], [first[_HEADER:], *parts[1:]]) != expected:
            raise FrameError("checksum does not match")


def _checksum(prelude: bytes | memoryview, parts: Sequence[memoryview]) -> bytes:
    state = xxhash.xxh3_128(prelude)
    for part in parts:
        state.update(part)
    return state.digest()


def _context(key: ChunkKey, tokens: int, index: int, header: bytes) -> bytes:
    return key + struct.pack("<II", tokens, index) + header


@lru_cache(maxsize=256)
def _header_bytes(spec: tuple[Step, ...], specs: tuple[TensorSpec, ...], document: bytes) -> bytes:
    fields = {"chain": spec, "tensors": specs, "namespace": json.loads(document)}
    return json.dumps(fields, separators=(",", ":")).encode()


@lru_cache(maxsize=256)
def _parse(header: bytes, tokens: int) -> _Header:
    try:
        fields = json.loads(header)
        spec = tuple((str(name), str(options)) for name, options in fields["chain"])
        specs = tuple(_spec(*entry) for entry in fields["tensors"])
        document = json.dumps(fields["namespace"], sort_keys=True, separators=(",", ":")).encode()
        parsed = _Header(Pipeline.from_spec(spec), specs, Namespace.from_document(document))
    except ConfigError as error:
        raise FrameError(f"written by a serde that is not here: {error}", "unreadable") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FrameError(f"impossible header: {error!r}") from error
    if not parsed.chain.fits(specs, parsed.namespace.layout, tokens):
        raise FrameError("its tensors are not those of its layout")
    return parsed


def _spec(name: object, dtype: object, shape: object) -> TensorSpec:
    if not (isinstance(name, str) and isinstance(dtype, str) and dtype in DTYPES):
        raise ValueError(f"no tensor: {name!r} of {dtype!r}")
    if not (isinstance(shape, list) and len(shape) <= 8):
        raise ValueError(f"no shape: {shape!r}")
    if not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise ValueError(f"no shape: {shape!r}")
    return TensorSpec(name, dtype, tuple(shape))
