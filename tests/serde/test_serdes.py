"""The built-in serdes: the conformance suite, and what each alone promises."""

from __future__ import annotations

import pytest
import torch
import zstandard
from safetensors.torch import load

from lmcache_core import TensorSpec
from lmcache_core.serde import Serde, byte_view
from lmcache_core.testing import SerdeConformance, random_tensors, tiny_layout
from lmcache_serde.raw import Raw
from lmcache_serde.safetensors import Safetensors
from lmcache_serde.zstd import Zstd


class TestRaw(SerdeConformance):
    @pytest.fixture
    def serde(self) -> Serde:
        return Raw(Raw.Options())


class TestSafetensors(SerdeConformance):
    @pytest.fixture
    def serde(self) -> Serde:
        return Safetensors(Safetensors.Options())


class TestZstd(SerdeConformance):
    @pytest.fixture(params=[1, 19])
    def serde(self, request: pytest.FixtureRequest) -> Serde:
        return Zstd(Zstd.Options(level=request.param))


def test_raw_copies_nothing_in_either_direction() -> None:
    tensors = random_tensors(tiny_layout(), 16)
    raw = Raw(Raw.Options())
    (one, two) = raw.encode(tensors)
    assert torch.frombuffer(one, dtype=torch.uint8).data_ptr() == tensors["g0.k"].data_ptr()
    assert torch.frombuffer(two, dtype=torch.uint8).data_ptr() == tensors["g0.v"].data_ptr()
    payload = memoryview(bytearray(b"".join([one, two])))
    specs = [TensorSpec.of(name, tensor) for name, tensor in tensors.items()]
    again = raw.decode([payload], specs)
    start = torch.frombuffer(payload, dtype=torch.uint8).data_ptr()
    assert again["g0.k"].data_ptr() == start
    assert again["g0.v"].data_ptr() == start + one.nbytes


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_a_safetensors_payload_is_a_file_that_the_library_opens(dtype: str) -> None:
    tensors = random_tensors(tiny_layout(dtype), 16)
    payload = b"".join(Safetensors(Safetensors.Options()).encode(tensors))
    opened = load(payload)
    assert set(opened) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(opened[name].view(torch.uint8), tensor.view(torch.uint8))


def test_zstd_makes_repetition_small_and_refuses_a_bomb() -> None:
    zstd = Zstd(Zstd.Options())
    parts = zstd.encode([memoryview(bytes(1 << 20))], b"")
    payload = memoryview(b"".join(parts))
    assert payload.nbytes < 1000
    with pytest.raises(ValueError, match="at most 1000"):
        zstd.decode([payload], b"", lambda n: memoryview(bytearray(n)), 1000)


def test_zstd_stores_noise_beside_what_it_compresses() -> None:
    zstd = Zstd(Zstd.Options())
    noise = torch.randint(0, 256, (300_001,), dtype=torch.uint8)
    parts = [bytes(200_000), noise.numpy().tobytes(), b"a", noise[:-7].numpy().tobytes(), b"ab" * 9]
    out = zstd.encode([memoryview(part) for part in parts], b"")
    payload = memoryview(b"".join(out))
    assert payload.nbytes < 600_000 + 300
    assert sum(part.nbytes for part in out if part.obj in parts) == 600_001 - 7 + 1  # no copy
    got = zstd.decode([payload], b"", lambda n: memoryview(bytearray(n)), 1 << 20)
    assert b"".join(got) == b"".join(parts)
    assert (
        sum(part.nbytes for part in got if part.obj is payload.obj) == 600_001 - 7 + 1
    )  # nor here


def test_zstd_reads_frames_of_other_writers() -> None:
    """Of several blocks, of which some hold noise as it is."""
    noise = torch.randint(0, 256, (300_001,), dtype=torch.uint8).numpy().tobytes()
    data = [noise, bytes(300_001), b"", noise[:9] * 40_000]
    packed = [zstandard.ZstdCompressor().compress(part) for part in data]
    got = Zstd(Zstd.Options()).decode(
        [memoryview(part) for part in packed], b"", lambda n: memoryview(bytearray(n)), 1 << 20
    )
    assert b"".join(got) == b"".join(data)


def test_zstd_refuses_what_ends_early_at_every_place() -> None:
    zstd = Zstd(Zstd.Options())
    noise = torch.randint(0, 256, (150_000,), dtype=torch.uint8).numpy().tobytes()
    whole = b"".join(zstd.encode([memoryview(b"abc" * 99), memoryview(noise)], b""))
    for end in (*range(60), 131_130, len(whole) - 1):
        if end == len(whole) - 150_000 - 8:  # exactly the first frame: its length tells
            continue
        with pytest.raises((ValueError, zstandard.ZstdError)):
            zstd.decode([memoryview(whole[:end])], b"", lambda n: memoryview(bytearray(n)), 1 << 20)


def test_neighbours_in_memory_are_one_buffer() -> None:
    whole = torch.arange(100, dtype=torch.uint8)
    assert len(byte_view([whole[:40], whole[40:]])) == 1
