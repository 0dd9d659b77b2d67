"""Peak memory of encoding and decoding: python -m tests.serde.measure_memory, in a process of its
own, for only the operating system counts what torch, numpy and libraries in C take.

Prints JSON: {"pipeline / dtype": [encode, decode]}, each the most resident memory beyond what there
was before the call, its result included, in chunks.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lmcache_core import Chunk, KVLayout, LayerGroup
from lmcache_core.backend import component
from lmcache_core.frames.frame import decode, encode
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.io.memory import HOST
from lmcache_core.kv.layout import DTYPES
from lmcache_core.testing import make_chunk

os.environ["LMCACHE_MEMORY_KEY"] = "5b" * 32
PIPELINES: list[list[tuple[str, dict[str, Any]]]] = [
    [("raw", {})],
    [("safetensors", {})],
    [("zstd", {})],
    [("byteplane", {})],
    [("byteplane", {}), ("zstd", {})],
    [("int8", {})],
    [("int8", {}), ("zstd", {})],
    [("int8", {"exact_layers": (1, 2)}), ("zstd", {})],
    [("fp8", {})],
    [("fp8", {}), ("zstd", {})],
    [("int4", {})],
    [("int4", {"group": 256}), ("zstd", {})],
    [("int4", {"group": 48})],
    [("int4", {"exact_layers": (1, 2)}), ("safetensors", {}), ("zstd", {})],
    [("coded", {}), ("zstd", {})],
    [("encrypt", {"key_env": "LMCACHE_MEMORY_KEY"})],
    [("byteplane", {}), ("zstd", {}), ("encrypt", {"key_env": "LMCACHE_MEMORY_KEY"})],
]


def peak(work: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes, and what `work` returns."""
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _field(status.read_text(), "VmRSS")
    result = work()
    after = _field(status.read_text(), "VmHWM")
    return after - before, result


def _field(status: str, name: str) -> int:
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def chunk_of(dtype: str) -> Chunk:
    """32 MiB: what is not the chunk's is small beside it."""
    tokens = 256 * 2 // DTYPES[dtype].itemsize
    group = LayerGroup(
        kind="attention", layers=tuple(range(32)), kv_heads=8, key_dim=128, value_dim=128,
        dtype=dtype,
    )  # fmt: skip
    return make_chunk(KVLayout(groups=(group,)), tokens)


def main() -> None:
    """Measure each pipeline for each dtype."""
    gc.disable()  # nothing here needs it
    HOST._keep = 0  # what is kept for reuse would not count the second time
    torch.set_num_threads(1)
    found = {}
    for dtype in ("bfloat16", "float32", "float8_e4m3fn"):
        chunk = chunk_of(dtype)
        for steps in PIPELINES:
            if dtype == "float8_e4m3fn" and steps[0][0] in ("int8", "fp8", "coded"):
                continue  # codes as large as the KV: they and the KV alone are two chunks
            classes = [(component("serdes", name), options) for name, options in steps]
            pipeline = Pipeline([cls(cls.Options(**options)) for cls, options in classes])
            for small in (True, False):  # first for what is imported and set up once
                one = make_chunk(chunk.namespace.layout, 32) if small else chunk
                encoded, parts = peak(partial(encode, one, pipeline))
                data = [memoryview(bytearray().join(parts))]
                del parts
                decoded, _ = peak(partial(decode, data, one.key, pipeline, one.tokens))
            name = ", ".join(n + (f" {o}" if o and n != "encrypt" else "") for n, o in steps)
            found[f"{name} / {dtype}"] = [
                round(size / chunk.nbytes, 2) for size in (encoded, decoded)
            ]
            del data
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
