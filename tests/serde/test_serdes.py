"""The built-in serdes: the conformance suite, and what each alone promises."""

from __future__ import annotations

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from lmcache_core import Serde, TensorSpec, byte_view
from lmcache_core.testing import SerdeConformance, random_tensors, tiny_layout
from lmcache_serde import byteplane
from lmcache_serde.byteplane import BytePlane
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
    known_size = False

    @pytest.fixture(params=[1, 19])
    def serde(self, request: pytest.FixtureRequest) -> Serde:
        return Zstd(Zstd.Options(level=request.param))


class TestBytePlane(SerdeConformance):
    known_size = False

    @pytest.fixture
    def serde(self) -> Serde:
        return BytePlane(BytePlane.Options())


class TestUnpackedBytePlane(SerdeConformance):
    @pytest.fixture
    def serde(self) -> Serde:
        return BytePlane(BytePlane.Options(packed=False))


@given(st.data())
def test_byteplane_brings_back_any_bits(data: st.DataObject) -> None:
    """Every pattern, NaN with its payload included."""
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    spec = TensorSpec("x", dtype, shape)
    raw = data.draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes))
    tensor = torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).view(shape)
    serde = BytePlane(BytePlane.Options())
    payload = memoryview(bytearray().join(serde.encode({"x": tensor})))
    again = serde.decode(payload, [spec])["x"]
    assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wild", [0, 1, 20, 5000])
def test_byteplane_keeps_exponents_that_have_no_code(
    monkeypatch: pytest.MonkeyPatch, dtype: str, wild: int
) -> None:
    """None, one, some, too many; over slices that do not divide the rows; an odd last token."""
    monkeypatch.setattr(byteplane, "SLICE", 6 * 33 * 9)
    values = torch.randn(5, 2, 33, 9, generator=torch.Generator().manual_seed(1)) + torch.linspace(
        0.1, 30, 9
    )
    flat = values.view(-1)
    places = torch.arange(wild) * 7919 % flat.numel()
    flat[places] = torch.exp2(torch.linspace(-126, 120, max(wild, 1))[:wild])
    tensor = values.to(getattr(torch, dtype))
    serde = BytePlane(BytePlane.Options())
    payload = memoryview(bytearray().join(serde.encode({"x": tensor})))
    again = serde.decode(payload, [TensorSpec.of("x", tensor)])["x"]
    assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8))
    packed = dtype != "float16" and wild < 100
    count = int.from_bytes(payload[:4], "little", signed=True)
    assert (wild // 2 <= count < wild + 60) if packed else count == -1
    assert payload.nbytes <= tensor.nbytes + 4 + 10 * 9


def test_byteplane_makes_what_zstd_can_compress() -> None:
    """Channels of different magnitude, as keys have them."""
    layout = tiny_layout()
    tensors = {
        name: (t.float() * torch.logspace(-3, 3, 8)).bfloat16()
        for name, t in random_tensors(layout, 512).items()
    }
    zstd, planes = Zstd(Zstd.Options()), BytePlane(BytePlane.Options())
    size = layout.bytes_per_token * 512
    alone = sum(p.nbytes for p in zstd.encode(Raw(Raw.Options()).encode(tensors), b""))
    chained = sum(p.nbytes for p in zstd.encode(planes.encode(tensors), b""))
    assert size / chained > 1.4 > size / alone


def test_raw_copies_nothing_in_either_direction() -> None:
    tensors = random_tensors(tiny_layout(), 16)
    raw = Raw(Raw.Options())
    (one, two) = raw.encode(tensors)
    assert torch.frombuffer(one, dtype=torch.uint8).data_ptr() == tensors["g0.k"].data_ptr()
    assert torch.frombuffer(two, dtype=torch.uint8).data_ptr() == tensors["g0.v"].data_ptr()
    payload = memoryview(bytearray(b"".join([one, two])))
    specs = [TensorSpec.of(name, tensor) for name, tensor in tensors.items()]
    again = raw.decode(payload, specs)
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
        zstd.decode(payload, b"", lambda n: memoryview(bytearray(n)), 1000)


def test_zstd_stores_noise_beside_what_it_compresses() -> None:
    zstd = Zstd(Zstd.Options())
    noise = torch.randint(0, 256, (300_001,), dtype=torch.uint8)
    parts = [bytes(200_000), noise.numpy().tobytes(), b"a", noise[:-7].numpy().tobytes(), b"ab" * 9]
    out = zstd.encode([memoryview(part) for part in parts], b"")
    payload = memoryview(b"".join(out))
    assert payload.nbytes < 600_000 + 300
    assert sum(part.nbytes for part in out if part.obj in parts) == 600_001 - 7 + 1  # no copy
    got = zstd.decode(payload, b"", lambda n: memoryview(bytearray(n)), 1 << 20)
    assert bytes(got) == b"".join(parts)
    reader = zstandard.ZstdDecompressor().stream_reader(payload, read_across_frames=True)
    assert reader.read() == b"".join(parts)  # a file that other tools open


def test_zstd_refuses_what_ends_early_at_every_place() -> None:
    zstd = Zstd(Zstd.Options())
    noise = torch.randint(0, 256, (150_000,), dtype=torch.uint8).numpy().tobytes()
    whole = b"".join(zstd.encode([memoryview(b"abc" * 99), memoryview(noise)], b""))
    for end in (*range(60), 131_130, len(whole) - 1):
        if end == len(whole) - 150_000 - 19:  # exactly the first frame: its length tells
            continue
        with pytest.raises((ValueError, zstandard.ZstdError)):
            zstd.decode(memoryview(whole[:end]), b"", lambda n: memoryview(bytearray(n)), 1 << 20)


def test_neighbours_in_memory_are_one_buffer() -> None:
    whole = torch.arange(100, dtype=torch.uint8)
    assert len(byte_view([whole[:40], whole[40:]])) == 1
