"""Frames: exactly what was encoded, or a FrameError with a reason. Never anything else."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import create_model

from lmcache_core import Chunk, ChunkKey, ConfigError, LayoutError, Namespace
from lmcache_core.backend import component
from lmcache_core.errors import FrameError
from lmcache_core.frames import frame as frames
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.kv.namespace import FRAME_VERSION
from lmcache_core.serde import FrameOptions, TensorsToTensors
from lmcache_core.testing.frames import forged, mutants, read_header
from tests.core.conftest import content

REASONS = {"damaged", "foreign", "unreadable"}


def pipeline_of(*names: str) -> Pipeline:
    classes = [component("serdes", name) for name in names]
    return Pipeline([cls(cls.Options()) for cls in classes])


PIPELINES = [(), ("raw",), ("zstd",), ("safetensors",), ("safetensors", "zstd")]


RAW = pipeline_of()


def make(namespace: Namespace, tokens: int = 4, index: int = 0) -> Chunk:
    key = namespace.keys(range(tokens * (index + 1)), tokens)[index]
    return Chunk(key, namespace, index, tokens, content(namespace, index, tokens))


def encoded(chunk: Chunk, *names: str) -> bytes:
    return b"".join(frames.encode(chunk, pipeline_of(*names)))


def decoded(data: bytes, key: ChunkKey, tokens: int = 4) -> Chunk:
    """As a tier without any serde reads it."""
    return frames.decode([memoryview(data)], key, RAW, tokens)


def same(a: Chunk, b: Chunk) -> bool:
    equal = all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    fields = ("key", "namespace", "index", "tokens")
    return (
        equal
        and set(a.tensors) == set(b.tensors)
        and all(getattr(a, name) == getattr(b, name) for name in fields)
    )


@pytest.mark.parametrize("names", PIPELINES)
@pytest.mark.parametrize("tokens", [1, 3, 256])
def test_round_trip(namespace: Namespace, names: tuple[str, ...], tokens: int) -> None:
    chunk = make(namespace, tokens, index=2)
    assert same(decoded(encoded(chunk, *names), chunk.key, tokens), chunk)


@pytest.mark.parametrize("names", PIPELINES)
def test_a_frame_decodes_from_parts_as_it_was_encoded(
    namespace: Namespace, names: tuple[str, ...]
) -> None:
    chunk = make(namespace)
    assert same(frames.decode(frames.encode(chunk, pipeline_of(*names)), chunk.key, RAW, 4), chunk)


def test_raw_frames_are_neither_copied_in_nor_out(namespace: Namespace) -> None:
    chunk = make(namespace, 256)
    head, *payload = frames.encode(chunk, pipeline_of())
    addresses = {t.data_ptr() for t in chunk.tensors.values()}
    assert {np.frombuffer(part, np.uint8).ctypes.data for part in payload} == addresses
    buffer = memoryview(bytearray(b"".join([head, *payload])))
    start = np.frombuffer(buffer, np.uint8).ctypes.data
    again = frames.decode([buffer], chunk.key, RAW, 256)
    for tensor in again.tensors.values():
        assert start < tensor.data_ptr() < start + buffer.nbytes


def test_the_header_says_what_a_person_wants_to_know(namespace: Namespace) -> None:
    data = encoded(make(namespace), "zstd")
    length = struct.unpack_from("<I", data, 8)[0]
    header = json.loads(data[80 : 80 + length])
    assert [name for name, _ in header["pipeline"]] == ["raw", "zstd"]
    assert header["namespace"]["model"] == "org/model@main"
    assert header["tensors"][0] == ["g0.k", "bfloat16", [2, 2, 4, 4]]


def test_another_keys_frame_is_foreign(namespace: Namespace) -> None:
    one, two = make(namespace, index=0), make(namespace, index=1)
    with pytest.raises(FrameError) as raised:
        decoded(encoded(two), one.key)
    assert raised.value.reason == "foreign"


def reason(data: bytes, key: ChunkKey) -> str:
    with pytest.raises(FrameError) as raised:
        decoded(data, key)
    return raised.value.reason


def test_a_newer_version_and_an_unknown_serde_or_option_are_unreadable(
    namespace: Namespace,
) -> None:
    chunk = make(namespace)
    data = encoded(chunk, "zstd")
    header = read_header(data)
    for pipeline in ([["wat", {}]], [["raw", {}], ["zstd", {"dictionary": 7}]]):
        other = forged(data, header={**header, "pipeline": pipeline})
        assert reason(other, chunk.key) == "unreadable"
    assert reason(forged(data, version=FRAME_VERSION + 1), chunk.key) == "unreadable"


def test_a_flipped_bit_is_damage_in_the_version_too(namespace: Namespace) -> None:
    chunk = make(namespace)
    for bit in range(8 * 80):
        data = bytearray(encoded(chunk))
        data[bit // 8] ^= 1 << bit % 8
        assert reason(bytes(data), chunk.key) == "damaged"


def test_a_frame_has_no_more_tokens_than_a_chunk_here(namespace: Namespace) -> None:
    chunk = make(namespace, 5)
    assert reason(encoded(chunk), chunk.key) == "damaged"
    assert decoded(encoded(chunk), chunk.key, 5).tokens == 5


def test_what_nobody_would_read_is_not_written(namespace: Namespace) -> None:
    class Blown(component("serdes", "raw")):
        def encode(self, tensors):
            return [memoryview(bytes(4 << 20))]

    with pytest.raises(LayoutError, match="at most"):
        frames.encode(make(namespace), Pipeline([Blown(Blown.Options())]))
    raw, zstd = (component("serdes", name) for name in ("raw", "zstd"))
    with pytest.raises(ConfigError, match="9 serdes"):
        Pipeline([raw(raw.Options()), *[zstd(zstd.Options())] * 8])


@pytest.mark.parametrize("annotation", [str, Path, bytes, dict[str, int], tuple[str, ...], Any])
def test_a_serde_cannot_let_a_frame_choose_more_than_numbers(annotation: Any) -> None:
    with pytest.raises(TypeError, match=r"Mine\.x: a frame is a stranger's"):
        create_model("Mine", __base__=FrameOptions, x=(annotation, ...))
    create_model("Mine", __base__=FrameOptions, x=(tuple[int, ...], ()), y=(Literal["a"], "a"))


class Scribbler(TensorsToTensors):
    """Writes to what it is given, which its author did not think of."""

    name = "scribbler"

    def encode(self, tensors, info):
        return {name: tensor.neg_() for name, tensor in tensors.items()}

    decode = encode


def test_a_serde_that_writes_to_its_input_changes_no_chunk(namespace: Namespace) -> None:
    chunk, before = make(namespace), make(namespace)
    pipeline = Pipeline([Scribbler(Scribbler.Options())])
    data = b"".join(frames.encode(chunk, pipeline))
    assert same(chunk, before)
    for _ in range(2):
        assert same(frames.decode([memoryview(bytearray(data))], chunk.key, pipeline, 4), before)


def test_a_frame_without_checksum_is_refused_outside_this_process(namespace: Namespace) -> None:
    chunk = make(namespace)
    data = b"".join(frames.encode(chunk, pipeline_of(), checksum=False))
    assert same(frames.decode([memoryview(data)], chunk.key, RAW, 4, verify=False), chunk)
    with pytest.raises(FrameError, match="checksum"):
        decoded(data, chunk.key)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_damaged(data: bytes) -> None:
    with pytest.raises(FrameError):
        decoded(data, ChunkKey(bytes(32)))


def test_nothing_at_all_is_damaged() -> None:
    with pytest.raises(FrameError):
        frames.decode([], ChunkKey(bytes(32)), RAW, 4)


# Fuzzing

MUTATIONS = 3_000_000


@pytest.mark.timeout(600)
def test_no_mutated_frame_ever_decodes(namespace: Namespace) -> None:
    """Bit flips, overwritten bytes, truncations, extensions and swapped bodies."""
    chunks = [make(namespace, index=i) for i in range(2)]
    originals = [encoded(chunk, *names) for chunk in chunks for names in PIPELINES]
    keys = [chunk.key for chunk in chunks for _ in PIPELINES]
    random = np.random.default_rng(2)
    each = MUTATIONS // len(originals)
    for number, (data, key) in enumerate(zip(originals, keys, strict=True)):
        other = originals[(number + len(PIPELINES)) % len(originals)]
        accepted = sum(_decodes(mutant, key) for mutant in _mutants(data, other, random, each))
        assert accepted == 0


def _mutants(data: bytes, other: bytes, random: np.random.Generator, count: int):
    """Frames that differ from `data` in one place or more."""
    size = len(data)
    kinds = random.integers(0, 8, count).tolist()
    places = random.integers(0, size, count).tolist()
    values = random.integers(1, 256, count).tolist()
    buffer = bytearray(data)
    for kind, place, value in zip(kinds, places, values, strict=True):
        if kind < 4:  # one byte changed: the buffer is mended afterwards, which is fastest
            buffer[place] ^= value if kind < 3 else 1 << (value & 7)
            yield buffer
            buffer[place] = data[place]
        elif kind == 4:
            yield data[:place]
        elif kind == 5:
            yield data + bytes(value)
        elif kind == 6 and data[place:] != other[place:]:
            yield data[:place] + other[place:]
        elif kind == 7 and data[:place] != other[:place]:
            yield other[:place] + data[place:]


def _decodes(data: bytes | bytearray, key: ChunkKey) -> bool:
    try:
        frames.decode((memoryview(data),), key, RAW, 4)
    except FrameError as error:
        return error.reason not in REASONS
    return True


@pytest.mark.parametrize("names", PIPELINES)
def test_a_forged_frame_never_crashes_the_reader(
    namespace: Namespace, names: tuple[str, ...]
) -> None:
    """With a right checksum the header itself is under attack: still an error or sound shapes."""
    chunk = make(namespace)
    for mutant in mutants(encoded(chunk, *names), 3_000):
        _decode_forged(mutant, chunk)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(st.data())
def test_a_forged_header_of_any_shape_never_crashes_the_reader(
    namespace: Namespace, data: st.DataObject
) -> None:
    chunk = make(namespace)
    original = encoded(chunk)
    header = read_header(original)
    field = data.draw(st.sampled_from([*header, None]))
    junk = data.draw(JUNK)
    _decode_forged(
        forged(original, header=junk if field is None else {**header, field: junk}), chunk
    )


def _decode_forged(data: bytes, chunk: Chunk) -> None:
    try:
        got = decoded(data, chunk.key)
    except FrameError as error:
        assert error.reason in REASONS
    else:
        got.namespace.layout.check(got.tensors, got.tokens)
        assert got.namespace == chunk.namespace
