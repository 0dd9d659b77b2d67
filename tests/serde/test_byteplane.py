"""byteplane: the conformance suite, and any bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache_core.serde import DTYPES, Serde, TensorSpec
from lmcache_core.testing import SerdeConformance, random_tensors, tiny_layout
from lmcache_serde import byteplane
from lmcache_serde.byteplane import BytePlane
from lmcache_serde.raw import Raw
from lmcache_serde.zstd import Zstd


def comes_back(tensor: torch.Tensor) -> memoryview:
    """Bit for bit; returns the payload."""
    spec, serde = TensorSpec.of("x", tensor), BytePlane(BytePlane.Options())
    payload = memoryview(bytearray().join(serde.encode({"x": tensor})))
    again = serde.decode([payload], [spec])["x"]
    assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8))
    return payload


class TestBytePlane(SerdeConformance):
    @pytest.fixture
    def serde(self) -> Serde:
        return BytePlane(BytePlane.Options())


@given(st.data())
def test_byteplane_brings_back_any_bits(data: st.DataObject) -> None:
    """Every pattern, NaN with its payload included."""
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    spec = TensorSpec("x", dtype, shape)
    raw = data.draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes))
    tensor = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).view(shape)
    comes_back(tensor)


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
    tensor = values.to(DTYPES[dtype])
    payload = comes_back(tensor)
    packed = dtype != "float16" and wild < 100
    count = int.from_bytes(payload[:4], "little", signed=True)
    assert (wild // 2 <= count < wild + 60) if packed else count == -1
    assert payload.nbytes <= tensor.nbytes + 4 + 10 * 9


def test_what_is_not_split_is_aligned_wherever_it_lies() -> None:
    tensors = {"x": torch.ones(3, dtype=torch.uint8), "y": torch.arange(5, dtype=torch.int64)}
    serde, specs = BytePlane(BytePlane.Options()), [TensorSpec.of(n, t) for n, t in tensors.items()]
    payload = b"".join(serde.encode(tensors))
    for place in range(8):
        moved = memoryview(bytearray(place) + payload)[place:]
        again = serde.decode([moved], specs)["y"]
        assert torch.equal(again, tensors["y"])
        assert again.data_ptr() % 8 == 0


@pytest.mark.parametrize("gap", [-(1 << 31), 5 * 9 * 9, (1 << 31) - 1])
def test_byteplane_writes_no_exponent_outside_of_its_tensor(gap: int) -> None:
    tensor = torch.ones(5, 9, 9, dtype=torch.bfloat16)
    tensor[1, 2, 3] = 1e30
    payload = comes_back(tensor)
    count = int.from_bytes(payload[:4], "little", signed=True)
    assert count > 0
    payload[-5 * count :][:4] = gap.to_bytes(4, "little", signed=True)
    with pytest.raises((ValueError, IndexError)):
        BytePlane(BytePlane.Options()).decode([payload], [TensorSpec.of("x", tensor)])


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
    both = sum(p.nbytes for p in zstd.encode(planes.encode(tensors), b""))
    assert size / both > 1.4 > size / alone
