"""Forged frames, many: python -m tests.serde.fuzz [--count N], in a process of its own, for only the
operating system tells what is really allocated.

Each pipeline reads N / len(PIPELINES) frames whose checksum holds and which differ from a true one
in a field or a few, or hold a bomb. Nothing but a FrameError may come of it, or tensors of the
layout. Prints JSON, by pipeline: how often each came, seconds in all and for the slowest, and MiB
that the address space and the memory in use grew by.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lmcache_core import Chunk, KVLayout, LayerGroup
from lmcache_core.backend import component
from lmcache_core.errors import FrameError
from lmcache_core.frames import frame
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.testing import make_chunk
from lmcache_core.testing.frames import forged, mutants, read_header

os.environ["LMCACHE_FUZZ_KEY"], os.environ["LMCACHE_FUZZ_OLD"] = "3d" * 32, "4e" * 32
KEYS = [{"key_env": "LMCACHE_FUZZ_KEY"}, {"key_env": "LMCACHE_FUZZ_OLD"}]
PIPELINES: list[list[tuple[str, dict[str, Any]]]] = [
    [("raw", {})],
    [("safetensors", {})],
    [("zstd", {})],
    [("byteplane", {})],
    [("byteplane", {}), ("zstd", {})],
    [("int8", {"exact_layers": (1,)})],
    [("fp8", {}), ("safetensors", {})],
    [("int4", {"group": 5}), ("zstd", {})],
    [("coded", {"exact_layers": (2,)}), ("zstd", {})],
    [("zstd", {}), ("encrypt", {"keys": KEYS})],
]
TOKENS = 11
HANG = 120
"""Seconds after which a frame hangs its reader, on however busy a machine: then a traceback says
where, and the process ends."""


def a_chunk() -> Chunk:
    """The first of its sequence, so that tokens are kept exact: attention, MLA, three dtypes."""
    one: dict[str, Any] = {"kind": "attention", "kv_heads": 2, "key_dim": 7, "value_dim": 5}
    groups = (
        LayerGroup(layers=(0, 1, 2), dtype="bfloat16", **one),
        LayerGroup(kind="mla", layers=(3,), kv_heads=1, key_dim=9, value_dim=0, dtype="float16"),
        LayerGroup(layers=(4, 5), dtype="float32", **one),
    )
    return make_chunk(KVLayout(groups=groups), TOKENS)


def pipeline_of(steps: list[tuple[str, dict[str, Any]]]) -> Pipeline:
    classes = [(component("serdes", name), options) for name, options in steps]
    return Pipeline([cls(cls.Options(**options)) for cls, options in classes])


def bombs(data: bytes) -> Iterator[bytes]:
    """Frames that unpack to 1 GiB, state so, or have no end of blocks, steps, tensors or tokens."""
    header = read_header(data)
    zstd = {**header, "pipeline": [["raw", {}], ["zstd", {}]]}
    for stated in (1 << 30, 1 << 20, 1 << 62, 100):
        head = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", stated)
        block = (128 << 10) << 3 | 2  # one byte, many times
        blocks = [(block | (n == 8191)).to_bytes(3, "little") + b"\0" for n in range(8192)]
        bomb = head + b"".join(blocks)
        yield forged(data, payload=bomb)
        for tokens in (TOKENS, (1 << 32) - 1):
            yield forged(data, header=zstd, payload=bomb, tokens=tokens)
    window = b"\x28\xb5\x2f\xfd\x80\xf8" + struct.pack("<I", 100) + b"\x01\0\0"  # of 2**41 bytes
    for payload in (window, b"\x50\x2a\x4d\x18\0\0\0\0" * 120_000, bytes(1 << 20)):
        yield forged(data, header=zstd, payload=payload)
    empty = b"\x28\xb5\x2f\xfd\x20\x00" + bytes(900_000)  # blocks of nothing
    yield forged(data, header=zstd, payload=empty)
    for steps in (8, 9, 5000):
        many = [["raw", {}], *[["zstd", {}]] * (steps - 1)]
        yield forged(data, header={**header, "pipeline": many})
    for name, dtype, shape in header["tensors"]:
        for large in ([1 << 30, *shape], [*shape[:-1], 1 << 39], [0, 1 << 39, 1 << 39], [1 << 18]):
            others = [each for each in header["tensors"] if each[0] != name]
            yield forged(data, header={**header, "tensors": [*others, [name, dtype, large]]})
    many = [[f"t{n}", "uint8", [0]] for n in range(8000)]
    yield forged(data, header={**header, "tensors": many}, payload=b"")
    yield forged(data, header=b"[" * (200 << 10))
    yield forged(data, header=b"1" * (200 << 10))
    for options in ({"key_file": "/dev/zero"}, {"key_env": "PATH"}, {"key_id": 1 << 64}):
        yield forged(data, header={**header, "pipeline": [["raw", {}], ["encrypt", options]]})


def fuzz(steps: list[tuple[str, dict[str, Any]]], count: int, seed: int) -> dict[str, Any]:
    """Read that many forged frames."""
    pipeline, chunk = pipeline_of(steps), a_chunk()
    data = b"".join(frame.encode(chunk, pipeline))
    _try(data, chunk, pipeline)
    came: Counter[str] = Counter()
    space, used = _status("VmPeak"), _status("VmRSS")
    total = slowest = 0.0
    for number, mutant in enumerate(chain(bombs(data), mutants(data, count, seed))):
        if number % 64 == 0:
            faulthandler.dump_traceback_later(HANG, exit=True)
        began = time.process_time()
        came[_try(mutant, chunk, pipeline)] += 1
        took = time.process_time() - began
        total, slowest = total + took, max(slowest, took)
    faulthandler.cancel_dump_traceback_later()
    return {
        **came,
        "seconds": round(total, 1),
        "slowest": round(slowest, 3),
        "space": _status("VmPeak") - space >> 20,
        "used": _status("VmRSS") - used >> 20,
    }


def _try(data: bytes, chunk: Chunk, pipeline: Pipeline) -> str:
    """The reason of the miss, or "read"; anything else that is raised comes through."""
    try:
        got = frame.decode([memoryview(data)], chunk.key, pipeline, TOKENS)
    except FrameError as error:
        return error.reason
    got.namespace.layout.check(got.tensors, got.tokens)
    assert got.namespace == chunk.namespace
    return "read"


def _status(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def main() -> None:
    """Fuzz each pipeline, after all are imported."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for steps in PIPELINES:  # what is imported and set up once is not a frame's doing
        fuzz(steps, 30, 0)
    found = {}
    for number, steps in enumerate(PIPELINES):
        name = ", ".join(name for name, _ in steps)
        count = options.count // len(PIPELINES)
        found[name] = fuzz(steps, count, options.seed + number)
        print(name, found[name], file=sys.stderr, flush=True)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
