"""Damage that the checksum does not see, as of a writer gone wrong: refused, or sound shapes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from lmcache_core import Chunk, KVLayout, LayerGroup
from lmcache_core.backend import component
from lmcache_core.errors import FrameError
from lmcache_core.frames.frame import decode, encode
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.serde import Serde
from lmcache_core.testing import make_chunk
from lmcache_core.testing.frames import forged, read_head, read_header

PIPELINES: list[list[tuple[str, dict[str, Any]]]] = [
    [("raw", {})],
    [("zstd", {})],
    [("zstd", {"level": 9})],
    [("byteplane", {})],
    [("byteplane", {}), ("zstd", {})],
    [("int8", {"exact_layers": (1,)})],
    [("fp8", {}), ("safetensors", {})],
    [("int4", {"group": 5}), ("zstd", {})],
    [("coded", {"exact_layers": (2,)}), ("zstd", {})],
]


def a_chunk() -> Chunk:
    """The first of its sequence, so that tokens are kept exact: attention, MLA, three dtypes."""
    one = {"kv_heads": 2, "key_dim": 7, "value_dim": 5}
    groups = (
        LayerGroup(kind="attention", layers=(0, 1, 2), dtype="bfloat16", **one),
        LayerGroup(kind="mla", layers=(3,), kv_heads=1, key_dim=9, value_dim=0, dtype="float16"),
        LayerGroup(kind="attention", layers=(4, 5), dtype="float32", **one),
    )
    return make_chunk(KVLayout(groups=groups), 11)


def pipeline_of(steps: list[tuple[str, dict[str, Any]]]) -> Pipeline:
    serdes: list[Serde] = []
    for name, options in steps:
        cls = component("serdes", name)
        serdes.append(cls(cls.Options(**options)))
    return Pipeline(serdes)


def damaged(payload: bytes, seed: int) -> Iterator[bytes]:
    """A few bytes changed, a run of zeros, ones or noise, parts swapped, dropped or doubled."""
    rng = random.Random(seed)
    size = len(payload)
    for _ in range(150):
        mutant = bytearray(payload)
        for _ in range(rng.randint(1, 6)):
            mutant[rng.randrange(size)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        yield bytes(mutant)
    for _ in range(60):
        start, end = sorted((rng.randrange(size), rng.randrange(size + 1)))
        for run in (bytes(end - start), b"\xff" * (end - start), rng.randbytes(end - start)):
            yield payload[:start] + run + payload[end:]
        yield payload[end:] + payload[:end]
        yield payload[:start] + payload[end:]
        yield payload[:end] + payload[start:]
    yield b""


@pytest.mark.parametrize("steps", PIPELINES, ids=str)
def test_a_damaged_payload_is_refused_or_keeps_its_shapes(steps: Any) -> None:
    chunk = a_chunk()
    pipeline = pipeline_of(steps)
    data = b"".join(encode(chunk, pipeline))
    for payload in damaged(data[read_head(data).payload :], len(str(steps))):
        _refused_or_sound(forged(data, payload=payload), chunk, pipeline)


@pytest.mark.parametrize("steps", PIPELINES[5:], ids=str)
def test_forged_specs_are_refused_or_keep_the_shapes(steps: Any) -> None:
    """The tensors that a quantizer wrote: missing, doubled, renamed, of other shapes or dtypes."""
    chunk = a_chunk()
    pipeline = pipeline_of(steps)
    data = b"".join(encode(chunk, pipeline))
    header = read_header(data)
    for tensors in _forged(header["tensors"]):
        _refused_or_sound(forged(data, header={**header, "tensors": tensors}), chunk, pipeline)


def _forged(tensors: list[Any]) -> Iterator[list[Any]]:
    for n, (name, dtype, shape) in enumerate(tensors):
        before, after = tensors[:n], tensors[n + 1 :]
        yield before + after
        yield [*before, tensors[n], *tensors[n:]]
        yield [*before, ["x", dtype, shape], *after]
        for other in ("int8", "uint8", "int32", "float16", "float32", "bfloat16"):
            yield [*before, [name, other, shape], *after]
        for other in (shape[::-1], [0, *shape[1:]], [1, *shape], shape[1:], [*shape[:-1], 1 << 39]):
            yield [*before, [name, dtype, other], *after]
        if after:  # two shapes exchanged
            yield [*before, [name, dtype, after[0][2]], [*after[0][:2], shape], *after[1:]]


def _refused_or_sound(data: bytes, chunk: Chunk, pipeline: Pipeline) -> None:
    try:
        got = decode([memoryview(data)], chunk.key, pipeline, chunk.tokens)
    except FrameError:
        return
    chunk.namespace.layout.check(got.tensors, chunk.tokens)
