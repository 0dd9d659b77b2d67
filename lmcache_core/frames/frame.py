"""Frame: the self-describing bytes of one chunk, written and read by a tier's pipeline.

A frame that is read is input from a stranger. What it may say: `limits`; how it lies in bytes:
`format`; which serdes read it: `pipeline`.
"""

from __future__ import annotations

import struct

from lmcache_core.errors import FrameError, LayoutError
from lmcache_core.frames.format import (
    HEADER,
    Head,
    parse_header,
    payload_start,
    write_head,
    write_header,
)
from lmcache_core.frames.limits import MAX_FRAME_BYTES, MAX_HEADER_BYTES, most_bytes
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.io.buffers import Buffers
from lmcache_core.kv.chunk import Chunk
from lmcache_core.kv.keys import ChunkKey
from lmcache_core.kv.layout import TensorSpec
from lmcache_core.kv.namespace import Namespace
from lmcache_core.serde import ChunkInfo


def encode(chunk: Chunk, pipeline: Pipeline, *, checksum: bool = True) -> list[memoryview]:
    """The frame of `chunk`: its head, then the payload's parts, not joined.

    `checksum=False` is for memory that nobody else can change; such a frame never decodes with
    `verify=True`. Raises LayoutError for a frame beyond the limits, which nobody would read.
    """
    info = ChunkInfo(chunk.namespace.layout, chunk.tokens, chunk.index)
    tensors = pipeline.to_tensors(chunk.tensors, info)
    specs = tuple(TensorSpec.of(name, tensor) for name, tensor in tensors.items())
    header = write_header(pipeline.steps, specs, chunk.namespace.document)
    payload = pipeline.to_payload(tensors, _context(chunk.key, chunk.tokens, chunk.index, header))
    nbytes = sum(part.nbytes for part in payload)
    most = min(most_bytes(chunk.nbytes), MAX_FRAME_BYTES - len(header) - HEADER)
    if nbytes > most or len(header) > MAX_HEADER_BYTES:
        raise LayoutError(
            f"a frame with a header of {len(header)} bytes and a payload of {nbytes}; "
            f"at most {MAX_HEADER_BYTES} and {most} are read"
        )
    head = write_head(chunk.key, chunk.tokens, chunk.index, header, payload, checksum=checksum)
    return [head, *payload]


def raw_bytes(namespace: Namespace, tokens: int, pipeline: Pipeline) -> int:
    """Bytes of the frame of a chunk of `tokens` tokens, its head with it, where no serde changes
    how many there are."""
    specs = namespace.layout.tensors(tokens)
    header = write_header(pipeline.steps, tuple(specs), namespace.document)
    return payload_start(len(header)) + sum(spec.nbytes for spec in specs)


def decode(
    parts: Buffers, key: ChunkKey, pipeline: Pipeline, chunk_size: int, *, verify: bool = True
) -> Chunk:
    """The chunk whose frame lies in `parts` (the head within the first), which must be `key`'s.

    `pipeline` is that of the tier that it comes from, `chunk_size` the most tokens that a chunk
    has. Tensors are views on the parts where the frame's own pipeline allows it. Raises FrameError,
    and nothing else, for bytes that are not that frame, or that this tier does not read.
    """
    head = Head.read(parts, verify=verify)
    if head.key != key:
        raise FrameError(f"the frame of {head.key.hex()}", "foreign")
    if not 0 < head.tokens <= chunk_size:
        raise FrameError(f"{head.tokens} tokens; a chunk has 1 to {chunk_size}")
    raw = bytes(parts[0][HEADER : HEADER + head.length])
    header = parse_header(raw, key.namespace, head.tokens)
    if head.nbytes > header.limit:
        raise FrameError(f"a payload of {head.nbytes} bytes; at most {header.limit} can be")
    info = ChunkInfo(header.namespace.layout, head.tokens, head.index)
    context = _context(key, head.tokens, head.index, raw)
    payload = [parts[0][head.payload :], *parts[1:]]
    tensors = pipeline.reading(header).decode(payload, header, info, context)
    return Chunk(key, header.namespace, head.index, head.tokens, tensors)


def namespace(parts: Buffers, key: ChunkKey) -> Namespace:
    """What the frame of `key` says of its namespace. Raises FrameError."""
    head = Head.read(parts, verify=False)
    if head.key != key:
        raise FrameError(f"the frame of {head.key.hex()}", "foreign")
    raw = bytes(parts[0][HEADER : HEADER + head.length])
    return parse_header(raw, key.namespace, head.tokens).namespace


def _context(key: ChunkKey, tokens: int, index: int, header: bytes) -> bytes:
    """Whose payload it is: what a seal binds."""
    return key + struct.pack("<II", tokens, index) + header
