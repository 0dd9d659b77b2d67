"""safetensors: the payload is a valid .safetensors file that other tools open.

Format: https://github.com/huggingface/safetensors - eight bytes of little-endian header length,
a JSON header, the tensors. For given specs there is one header that this serde writes, so decoding
compares it instead of parsing it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import lru_cache

from lmcache_core.serde import (
    Buffers,
    Tensors,
    TensorSpec,
    TensorsToBytes,
    byte_view,
    split_at,
    views,
)

_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
}


class Safetensors(TensorsToBytes):
    """The tensors under their names, with no copy beyond the header."""

    name = "safetensors"
    known_size = True
    keeps_input = True

    def encode(self, tensors: Tensors) -> list[memoryview]:
        specs = tuple(TensorSpec.of(name, tensor) for name, tensor in tensors.items())
        return [memoryview(_header(specs)), *byte_view(tensors.values())]

    def decode(self, parts: Buffers, specs: Sequence[TensorSpec]) -> Tensors:
        expected = _header(tuple(specs))
        header, tensors = split_at(parts, len(expected))
        if header != expected:
            raise ValueError("not the safetensors header of these tensors")
        return views(tensors, specs)


@lru_cache(maxsize=64)
def _header(specs: tuple[TensorSpec, ...]) -> bytes:
    fields: dict[str, object] = {}
    offset = 0
    for spec in specs:
        fields[spec.name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # keeps the tensors aligned
    return struct.pack("<Q", len(text)) + text
