"""Digests of tensors: any change of their bytes is seen, on a CPU and by the checksum of devices."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import xxhash
from torch._subclasses import FakeTensorMode

from lmcache_core.connector import combined_digest, tensor_digests
from lmcache_core.errors import NoContent
from lmcache_core.kv.checksum import BLOCK, ROWS, checksums
from lmcache_core.kv.content import PIECE

Digest = Callable[[torch.Tensor], bytes]


def by_hash(tensor: torch.Tensor) -> bytes:
    return tensor_digests([tensor])[0]


def by_checksum(tensor: torch.Tensor) -> bytes:
    return checksums([tensor.view(-1).view(torch.uint8)])[0]


@pytest.fixture(params=[by_hash, by_checksum])
def digest(request: pytest.FixtureRequest) -> Digest:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    """Of many blocks, the last of them broken."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(301, 577, generator=generator).to(request.param)


def changed(weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    raw = weight.view(-1).view(torch.uint8)
    for byte in (0, 1, 3, BLOCK - 1, BLOCK, BLOCK * ROWS, raw.numel() // 2, raw.numel() - 1):
        for bit in range(8):
            other = weight.clone()
            other.view(-1).view(torch.uint8)[byte] ^= 1 << bit
            yield f"bit {bit} of byte {byte}", other
    for first, second in ((0, 1), (0, 2048), (5, 6000), (weight.numel() - 2, weight.numel() - 1)):
        other = weight.clone()
        flat = other.view(-1)
        flat[first], flat[second] = weight.view(-1)[second].clone(), weight.view(-1)[first].clone()
        yield f"values {first} and {second} exchanged", other
    yield "rows in another order", weight[torch.randperm(weight.shape[0])].contiguous()
    yield "columns in another order", weight[:, torch.randperm(weight.shape[1])].contiguous()
    yield "rows reversed", weight.flip(0).contiguous()
    yield "rotated", weight.roll(1).contiguous()
    yield "signs of two", torch.cat([-weight[:2], weight[2:]])
    yield "all signs", -weight
    yield "scaled", weight * 1.5


def test_each_change_gives_another_digest(weight: torch.Tensor, digest: Digest) -> None:
    right = digest(weight)
    assert digest(weight.clone()) == right
    seen = {right}
    for what, other in changed(weight):
        assert not torch.equal(other, weight), what
        found = digest(other)
        assert found not in seen, what
        seen.add(found)


def test_two_signs_and_equal_changes_of_opposite_sign_do_not_cancel(digest: Digest) -> None:
    weight = torch.zeros(BLOCK * 4, dtype=torch.uint8)
    right = digest(weight)
    for first, second in ((7, 15), (0, BLOCK), (3, BLOCK * 2 + 3)):
        for values in ((128, 128), (1, 255), (16, 240)):
            other = weight.clone()
            other[first], other[second] = values
            assert digest(other) != right


@pytest.mark.parametrize("nbytes", [0, 1, 7, BLOCK, BLOCK + 1, BLOCK * ROWS, BLOCK * ROWS + 1])
def test_any_size(nbytes: int, digest: Digest) -> None:
    weight = torch.randint(1, 255, (nbytes,), dtype=torch.uint8)
    assert digest(weight) == digest(weight.clone())
    if nbytes:
        other = weight.clone()
        other[-1] -= 1
        assert digest(other) != digest(weight)


def test_many_at_once_are_what_each_is_alone() -> None:
    sizes = [1, BLOCK, 3 * BLOCK * ROWS + 5, 0, 17, 2 * PIECE + 3]
    tensors = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in sizes]
    assert tensor_digests(tensors) == [by_hash(tensor) for tensor in tensors]
    assert checksums(tensors) == [by_checksum(each) for each in tensors]


def test_threads_do_not_matter() -> None:
    weight = torch.randn(5, PIECE // 4 + 3)
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.add(by_hash(weight))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


# Strides, layouts, subclasses


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, 3:],
        lambda x: x[::2],
        lambda x: x[:1].expand(7, -1),
        lambda x: x.view(2, 600, -1).transpose(0, 2),
        lambda x: x[:0],
        lambda x: x.t()[1:],
    ],
)
def test_any_strides(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = torch.randn(1200, 1500)
    before = by_hash(view(weight))
    assert by_hash(view(weight.clone())) == before
    seen = view(weight)
    if seen.numel():
        at = tuple(size // 2 for size in seen.shape)
        seen[at] += 1
        assert by_hash(seen) != before
        seen[at] -= 1


def test_what_a_view_leaves_out_does_not_matter() -> None:
    weight = torch.randn(1200, 1500)
    before = by_hash(weight[:, 3:])
    weight[:, 0] = 0
    assert by_hash(weight[:, 3:]) == before


def test_dtype_shape_and_order_of_dimensions_are_in_it() -> None:
    weight = torch.randn(64, 64)
    forms = (weight, weight.view(torch.int32), weight.view(32, 128), weight.t())
    assert len({by_hash(form) for form in forms}) == len(forms)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.int64, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.float64],
)
def test_any_dtype(dtype: torch.dtype) -> None:
    weight = torch.ones(5, 3, dtype=torch.float32).to(dtype)
    before = by_hash(weight)
    weight.view(-1).view(torch.uint8)[-1] ^= 1
    assert by_hash(weight) != before
    assert by_hash(torch.tensor(1).to(dtype)) != before


def test_conjugates_are_what_they_show() -> None:
    weight = torch.randn(3, 3, dtype=torch.complex64)
    assert by_hash(weight.conj()) == by_hash(weight.conj().resolve_conj())
    assert by_hash(weight.conj()) != by_hash(weight)


class Pair(torch.Tensor):
    """Two tensors that look like one."""

    @staticmethod
    def __new__(cls, one: torch.Tensor, two: torch.Tensor, note: object = None) -> Pair:
        return torch.Tensor._make_wrapper_subclass(cls, one.shape, dtype=one.dtype)

    def __init__(self, one: torch.Tensor, two: torch.Tensor, note: object = None) -> None:
        self.one, self.two, self.note = one, two, note

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return ["one", "two"], self.note

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kw: object = None):
        raise NotImplementedError("nobody should compute with it")


def test_a_subclass_is_the_tensors_that_it_is_made_of() -> None:
    one, two = torch.randn(4, 4), torch.randn(4, 4)
    before = by_hash(Pair(one, two))
    assert by_hash(Pair(one.clone(), two.clone())) == before
    assert by_hash(Pair(two, one)) != before
    assert by_hash(Pair(one, two, {"block": (16, 16)})) != before
    two[3, 3] += 1
    assert by_hash(Pair(one, two)) != before


def test_parameters_and_sparse_tensors() -> None:
    weight = torch.randn(8, 8)
    assert by_hash(torch.nn.Parameter(weight)) == by_hash(weight)
    sparse = weight.to_sparse()
    before = by_hash(sparse)
    weight[0, 0] += 1
    assert by_hash(weight.to_sparse()) != before


@pytest.mark.parametrize("weight_of", ["meta", "fake", "unknown"])
def test_a_tensor_without_bytes_is_named(weight_of: str) -> None:
    if weight_of == "fake":
        with FakeTensorMode():
            tensor = torch.empty(3, 4)
    elif weight_of == "meta":
        tensor = torch.empty(3, 4, device="meta")
    else:
        tensor = Pair(torch.ones(3, 4), torch.ones(3, 4), object())
    with pytest.raises(NoContent, match=r"\[3, 4\]|made with a object"):
        tensor_digests([torch.ones(2), tensor])


def test_modes_do_not_come_between() -> None:
    class Doubled(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise AssertionError("a mode has no part in reading bytes")

    weight = torch.randn(3, PIECE // 4)
    before = by_hash(weight)
    with Doubled():
        assert by_hash(weight) == before


# All of a model's


def test_names_count_and_their_order_does_not() -> None:
    a, b = tensor_digests([torch.ones(2), torch.zeros(2)])
    both = combined_digest({"a": a, "b": b})
    assert combined_digest({"b": b, "a": a}) == both
    assert combined_digest({"a": b, "b": a}) != both
    assert combined_digest({"a": a}) != both
    assert combined_digest({"a1 ": a, "b": b}) != both


def test_digests_are_the_same_in_every_process() -> None:
    code = (
        "import torch; from lmcache_core.connector import tensor_digests; "
        "from lmcache_core.kv.checksum import checksums; "
        "x = torch.arange(9999); "
        "print(tensor_digests([x])[0].hex(), checksums([x.view(torch.uint8)])[0].hex())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    weight = torch.arange(9999)
    here = (by_hash(weight).hex(), by_checksum(weight).hex())
    assert [each.split() for each in found] == [list(here)] * 2
    assert len(xxhash.xxh3_128_digest(b"")) == len(by_hash(weight))
