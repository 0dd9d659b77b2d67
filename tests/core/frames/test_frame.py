"""Frames: exactly what was encoded, or a FrameError with a reason. Never anything else."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from lmcache_core import Chunk, ChunkKey, FrameError, Namespace, component
from lmcache_core.frames import frame as frames
from lmcache_core.frames.pipeline import Pipeline
from tests.core.conftest import content

REASONS = {"damaged", "foreign", "unreadable"}


def chain(*names: str) -> Pipeline:
    classes = [component("serdes", name) for name in names]
    return Pipeline([cls(cls.Options()) for cls in classes])


CHAINS = [(), ("raw",), ("zstd",), ("safetensors",), ("safetensors", "zstd")]


def make(namespace: Namespace, tokens: int = 4, index: int = 0) -> Chunk:
    key = namespace.keys(range(tokens * (index + 1)), tokens)[index]
    return Chunk(key, namespace, index, tokens, content(namespace, index, tokens))


def encoded(chunk: Chunk, *names: str) -> bytes:
    return b"".join(frames.encode(chunk, chain(*names)))


def same(a: Chunk, b: Chunk) -> bool:
    equal = all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    fields = ("key", "namespace", "index", "tokens")
    return (
        equal
        and set(a.tensors) == set(b.tensors)
        and all(getattr(a, name) == getattr(b, name) for name in fields)
    )


@pytest.mark.parametrize("names", CHAINS)
@pytest.mark.parametrize("tokens", [1, 3, 256])
def test_round_trip(namespace: Namespace, names: tuple[str, ...], tokens: int) -> None:
    chunk = make(namespace, tokens, index=2)
    assert same(frames.decode([memoryview(encoded(chunk, *names))], chunk.key), chunk)


@pytest.mark.parametrize("names", CHAINS)
def test_a_frame_decodes_from_parts_as_it_was_encoded(
    namespace: Namespace, names: tuple[str, ...]
) -> None:
    chunk = make(namespace)
    assert same(frames.decode(frames.encode(chunk, chain(*names)), chunk.key), chunk)


def test_raw_frames_are_neither_copied_in_nor_out(namespace: Namespace) -> None:
    chunk = make(namespace, 256)
    head, *payload = frames.encode(chunk, chain())
    addresses = {t.data_ptr() for t in chunk.tensors.values()}
    assert {np.frombuffer(part, np.uint8).ctypes.data for part in payload} == addresses
    buffer = memoryview(bytearray(b"".join([head, *payload])))
    start = np.frombuffer(buffer, np.uint8).ctypes.data
    again = frames.decode([buffer], chunk.key)
    for tensor in again.tensors.values():
        assert start < tensor.data_ptr() < start + buffer.nbytes


def test_the_header_says_what_a_person_wants_to_know(namespace: Namespace) -> None:
    data = encoded(make(namespace), "zstd")
    length = struct.unpack_from("<I", data, 8)[0]
    header = json.loads(data[80 : 80 + length])
    assert [name for name, _ in header["chain"]] == ["raw", "zstd"]
    assert header["namespace"]["model"] == "org/model@main"
    assert header["tensors"][0] == ["g0.k", "bfloat16", [2, 2, 4, 4]]


def test_another_keys_frame_is_foreign(namespace: Namespace) -> None:
    one, two = make(namespace, index=0), make(namespace, index=1)
    with pytest.raises(FrameError) as raised:
        frames.decode([memoryview(encoded(two))], one.key)
    assert raised.value.reason == "foreign"


def test_a_newer_version_and_an_unknown_serde_or_option_are_unreadable(
    namespace: Namespace,
) -> None:
    chunk = make(namespace)
    newer = bytearray(encoded(chunk))
    newer[4:6] = struct.pack("<H", frames.FRAME_VERSION + 1)
    unknown = signed(bytearray(encoded(chunk).replace(b'"raw"', b'"wat"')))
    option = signed(bytearray(encoded(chunk, "zstd").replace(b"level", b"lever")))
    for data in (newer, unknown, option):
        with pytest.raises(FrameError) as raised:
            frames.decode([memoryview(data)], chunk.key)
        assert raised.value.reason == "unreadable"


def test_a_frame_that_was_not_sealed_is_refused_outside_this_process(namespace: Namespace) -> None:
    chunk = make(namespace)
    data = b"".join(frames.encode(chunk, chain(), seal=False))
    assert same(frames.decode([memoryview(data)], chunk.key, verify=False), chunk)
    with pytest.raises(FrameError, match="checksum"):
        frames.decode([memoryview(data)], chunk.key)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_damaged(data: bytes) -> None:
    with pytest.raises(FrameError):
        frames.decode([memoryview(data)], ChunkKey(bytes(32)))


def test_nothing_at_all_is_damaged() -> None:
    with pytest.raises(FrameError):
        frames.decode([], ChunkKey(bytes(32)))


# Fuzzing

MUTATIONS = 3_000_000


@pytest.mark.timeout(600)
def test_no_mutated_frame_ever_decodes(namespace: Namespace) -> None:
    """Bit flips, overwritten bytes, truncations, extensions and swapped bodies."""
    chunks = [make(namespace, index=i) for i in range(2)]
    originals = [encoded(chunk, *names) for chunk in chunks for names in CHAINS]
    keys = [chunk.key for chunk in chunks for _ in CHAINS]
    random = np.random.default_rng(2)
    each = MUTATIONS // len(originals)
    for number, (data, key) in enumerate(zip(originals, keys, strict=True)):
        other = originals[(number + len(CHAINS)) % len(originals)]
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
        frames.decode((memoryview(data),), key)
    except FrameError as error:
        return error.reason not in REASONS
    return True


def signed(data: bytearray) -> bytearray:
    """The same frame with a checksum that holds, as a forger would make it."""
    state = xxhash.xxh3_128(bytes(data[:64]))
    state.update(bytes(data[80:]))
    data[64:80] = state.digest()
    return data


@pytest.mark.parametrize("names", CHAINS)
def test_a_forged_frame_never_crashes_the_reader(
    namespace: Namespace, names: tuple[str, ...]
) -> None:
    """With a right checksum the header itself is under attack: still an error or sound shapes."""
    chunk = make(namespace)
    data = encoded(chunk, *names)
    length = struct.unpack_from("<I", data, 8)[0]
    random = np.random.default_rng(3)
    for _ in range(8_000):
        mutant = bytearray(data)
        for _ in range(random.integers(1, 4)):
            mutant[random.integers(0, 80 + length)] = random.integers(0, 256)
        _decode_forged(signed(mutant), chunk)


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
    length = struct.unpack_from("<I", original, 8)[0]
    header = json.loads(original[80 : 80 + length])
    field = data.draw(st.sampled_from([*header, None]))
    forged = data.draw(JUNK) if field is None else {**header, field: data.draw(JUNK)}
    text = json.dumps(forged).encode()
    head = bytearray(original[:80])
    head[8:12] = struct.pack("<I", len(text))
    payload = original[80 + length + (-(80 + length) % 64) :]
    padded = text + bytes(-(80 + len(text)) % 64)
    _decode_forged(signed(head + padded + payload), chunk)


def _decode_forged(data: bytearray, chunk: Chunk) -> None:
    try:
        got = frames.decode([memoryview(data)], chunk.key)
    except FrameError as error:
        assert error.reason in REASONS
    else:
        got.namespace.layout.check(got.tensors, got.tokens)
        assert got.namespace == chunk.namespace
