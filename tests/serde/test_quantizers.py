"""The lossy serdes: the conformance suite within each one's bound, and what they keep exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load

from lmcache_core import KVLayout, LayerGroup, LayoutError
from lmcache_core.backend import component
from lmcache_core.frames.frame import decode, encode
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.serde import ChunkInfo, Serde
from lmcache_core.testing import SerdeConformance, make_chunk, random_tensors, tiny_layout
from lmcache_serde.coded import Coded
from lmcache_serde.fp8 import Fp8
from lmcache_serde.int4 import Int4
from lmcache_serde.int8 import Int8


def made(name: str, **options: Any) -> Serde:
    cls = component("serdes", name)
    return cls(cls.Options(**options))


class Lossy(SerdeConformance):
    """Bounds are stated for finite numbers; NaN and Inf come back as they were."""

    def bound(self, original: torch.Tensor) -> torch.Tensor:
        """What each number may be off by, before it is rounded to the tensor's own dtype."""
        raise NotImplementedError

    def assert_close(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        got, true = decoded.float(), original.float()
        wild = ~torch.isfinite(true)
        assert torch.equal(got[wild].nan_to_num(7), true[wild].nan_to_num(7))
        got, true = got.masked_fill(wild, 0), true.masked_fill(wild, 0)
        dtype = torch.finfo(original.dtype)
        bound = self.bound(true)
        rounding = (true.abs() + bound) * dtype.eps + dtype.smallest_normal * dtype.eps
        assert bool(((got - true).abs() <= bound + rounding + 1e-36).all())


def peak(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().amax(dim=-1, keepdim=True)


class TestInt8(Lossy):
    @pytest.fixture
    def serde(self) -> Serde:
        return made("int8")

    def bound(self, original: torch.Tensor) -> torch.Tensor:
        # Half a step, and one more half where the 16-bit scale was rounded down.
        return peak(original) * (1 / 127 + 2**-9)


class TestFp8(Lossy):
    @pytest.fixture
    def serde(self) -> Serde:
        return made("fp8")

    def bound(self, original: torch.Tensor) -> torch.Tensor:
        return original.abs() * (1 / 16 + 2**-8) + peak(original) / 448 / 2**10


class TestInt4(Lossy):
    @pytest.fixture(params=[2, 32])
    def serde(self, request: pytest.FixtureRequest) -> Serde:
        return made("int4", group=request.param)

    def bound(self, original: torch.Tensor) -> torch.Tensor:
        # At worst one group holds the smallest and the largest number of the tensor. `low`,
        # `scale` and the sum of both are rounded to 16 bits.
        reach = original.max() - original.min()
        return reach * (0.5 / 15) + original.abs().max() * 2**-6 + torch.zeros_like(original)


class TestCoded(Lossy):
    @pytest.fixture(params=[0.05, 0.35, 2.0])
    def serde(self, request: pytest.FixtureRequest) -> Serde:
        return made("coded", step=request.param)

    def bound(self, original: torch.Tensor) -> torch.Tensor:
        # Half of the largest step that there can be: keys deviate from a mean, values from 0.
        reach = torch.maximum(original.max() - original.min(), original.abs().max())
        return reach * (1 + 2**-4 + 2**-6) + torch.zeros_like(original)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_coded_is_off_by_half_a_step_at_most(dtype: str) -> None:
    layout = tiny_layout(dtype)
    info = ChunkInfo(layout, 512, 1)
    tensors = random_tensors(layout, 512)
    serde = made("coded", step=0.5)
    for name, tensor in serde.decode(serde.encode(tensors, info), info).items():
        along = 2 if name.endswith("k") else 3
        true = tensors[name].float()
        deviation = true.square().mean(along, keepdim=True).sqrt()
        error = (tensor.float() - true).abs()
        assert bool((error <= 0.25 * deviation * (1 + 2**-4) + true.abs() * 2**-6).all())
        assert float(error.max()) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_coded_reaches_a_lone_number(dtype: str) -> None:
    """However far it is from the others, and where squares would overflow."""
    for tokens, far in ((4096, 3.0), (4096, 1e36)):
        layout = tiny_layout(dtype)
        info = ChunkInfo(layout, tokens, 1)
        tensors = {n: torch.zeros_like(t) for n, t in random_tensors(layout, tokens).items()}
        for tensor in tensors.values():
            tensor[0, 0, 7, 3] = far
        serde = made("coded", step=0.05)
        for name, tensor in serde.decode(serde.encode(tensors, info), info).items():
            assert bool(torch.isfinite(tensor).all())
            assert float((tensor.float() - tensors[name].float()).abs().max()) < far / 100


NAMES = ["int8", "fp8", "int4", "coded"]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_tokens_of_a_sequence_are_exact(name: str) -> None:
    layout = tiny_layout()
    for index, exact in ((0, 4), (1, 0)):
        chunk = make_chunk(layout, 40, index=index)
        pipeline = Pipeline([made(name)])
        got = decode(encode(chunk, pipeline), chunk.key, pipeline, chunk.tokens)
        for tensor, original in zip(got.tensors.values(), chunk.tensors.values(), strict=True):
            same = (tensor == original).all(dim=3).all(dim=0).all(dim=0)
            assert bool(same[:exact].all())
            assert not bool(same[exact:].all())


@pytest.mark.parametrize("name", NAMES)
def test_chosen_layers_are_exact(name: str) -> None:
    groups = tuple(
        LayerGroup(kind="attention", layers=layers, kv_heads=2, key_dim=8, value_dim=8, dtype=dtype)
        for layers, dtype in (((0, 2, 3), "bfloat16"), ((1,), "float32"))
    )
    layout = KVLayout(groups=groups)
    chunk = make_chunk(layout, 20, index=1)
    pipeline = Pipeline([made(name, exact_layers=(1, 2))])
    got = decode(encode(chunk, pipeline), chunk.key, pipeline, chunk.tokens)
    for part in "kv":
        one, two = got.tensors[f"g0.{part}"], chunk.tensors[f"g0.{part}"]
        assert [torch.equal(a, b) for a, b in zip(one, two, strict=True)] == [False, True, False]
        assert torch.equal(got.tensors[f"g1.{part}"], chunk.tensors[f"g1.{part}"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_wild_number_costs_no_other_token_its_precision(name: str, value: float) -> None:
    layout = tiny_layout()
    tame = random_tensors(layout, 64)
    wild = {n: t.clone() for n, t in tame.items()}
    for tensor in wild.values():
        tensor[1, 1, 10, 3] = value
    info = ChunkInfo(layout, 64, 1)
    serde = made(name)
    for n, tensor in serde.decode(serde.encode(wild, info), info).items():
        assert torch.equal(tensor[:, :, 10].nan_to_num(7), wild[n][:, :, 10].nan_to_num(7))
        error = (tensor.float() - wild[n].float()).abs()
        error[:, :, 10] = 0
        assert float(error.max()) < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_a_sink_does_not_spoil_its_neighbours(name: str) -> None:
    layout = tiny_layout()
    tensors = random_tensors(layout, 32)
    for tensor in tensors.values():
        tensor[:, :, 0] *= 1000
    info = ChunkInfo(layout, 32, 0)
    serde = made(name)
    for n, tensor in serde.decode(serde.encode(tensors, info), info).items():
        assert float((tensor.float() - tensors[n].float()).abs().max()) < 0.5


@pytest.mark.parametrize(
    ("name", "ratio"), [("int8", 1.9), ("fp8", 1.9), ("int4", 3.15), ("coded", 1.9)]
)
def test_the_size_is_known_before(name: str, ratio: float) -> None:
    group = LayerGroup(
        kind="attention", layers=(0, 1), kv_heads=3, key_dim=64, value_dim=64, dtype="bfloat16"
    )
    layout = KVLayout(groups=(group,))
    sizes = set()
    for seed in range(3):
        serde = made(name)
        tensors = random_tensors(layout, 256, seed)
        out = serde.encode(tensors, ChunkInfo(layout, 256, 1))
        sizes.add(sum(t.nbytes for t in out.values()))
    assert len(sizes) == 1
    assert layout.bytes_per_token * 256 / sizes.pop() >= ratio


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_with_safetensors_gives_a_file_that_opens(name: str) -> None:
    chunk = make_chunk(tiny_layout(), 40)
    pipeline = Pipeline([made(name), made("safetensors")])
    info = ChunkInfo(chunk.namespace.layout, chunk.tokens, chunk.index)
    tensors = pipeline.to_tensors(chunk.tensors, info)
    opened = load(b"".join(pipeline.to_payload(tensors, b"")))
    assert {"g0.k.codes", "g0.k.scale", "g0.k.kept", "g0.k.at"} <= set(opened)
    for key, tensor in tensors.items():
        assert torch.equal(opened[key].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_kv_in_an_engines_own_packing_is_refused(name: str) -> None:
    group = LayerGroup(
        kind="opaque", layers=(0,), kv_heads=1, key_dim=8, value_dim=0, dtype="uint8"
    )
    layout = KVLayout(groups=(group,))
    with pytest.raises(LayoutError, match="own packing"):
        made(name).encode(
            {"g0.k": torch.zeros(1, 1, 4, 8, dtype=torch.uint8)}, ChunkInfo(layout, 4, 0)
        )


def test_fp8_never_saturates_and_has_no_nan() -> None:
    layout = tiny_layout()
    info = ChunkInfo(layout, 64, 1)
    for seed in range(20):
        tensors = {n: t * 10.0 ** (seed - 10) for n, t in random_tensors(layout, 64, seed).items()}
        codes = made("fp8").encode(tensors, info)["g0.k.codes"].float()
        assert bool(torch.isfinite(codes).all())
        assert float(codes.abs().max()) == 448


def test_the_shift_of_fp8_is_exact_for_every_code() -> None:
    from lmcache_serde.fp8 import _to_bfloat16

    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = torch.isfinite(codes.float())
    numbers = _to_bfloat16(codes, torch.empty(256, dtype=torch.bfloat16))
    assert torch.equal(numbers.float()[finite], codes.float()[finite])


def test_quantizing_leaves_its_input_alone() -> None:
    for cls in (Int8, Fp8, Int4, Coded):
        tensors = random_tensors(tiny_layout("float32"), 40)
        before = {n: t.clone() for n, t in tensors.items()}
        cls(cls.Options()).encode(tensors, ChunkInfo(tiny_layout("float32"), 40, 0))
        assert all(torch.equal(t, before[n]) for n, t in tensors.items())
