"""KVLayout: sizes, order and checks; views and bytes without copies."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lmcache_core import KVLayout, LayerGroup, LayoutError, TensorSpec, copy_exact
from lmcache_core.serde import byte_view, views


def group(**changes: object) -> LayerGroup:
    fields = {
        "kind": "attention", "layers": (0,), "kv_heads": 2, "key_dim": 3, "value_dim": 5,
        "dtype": "bfloat16",
    }  # fmt: skip
    return LayerGroup(**{**fields, **changes})


MIXED = KVLayout(groups=(group(), group(layers=(1, 2), dtype="float32", kind="sliding", window=4)))


def test_bytes_per_token_is_the_sum_over_layers_heads_and_dims() -> None:
    assert MIXED.bytes_per_token == 2 * (3 + 5) * 2 + 2 * 2 * (3 + 5) * 4


def test_widest_dtypes_lie_first_so_that_all_are_aligned() -> None:
    assert [spec.name for spec in MIXED.tensors(7)] == ["g1.k", "g1.v", "g0.k", "g0.v"]
    buffer = memoryview(bytearray(MIXED.bytes_per_token * 7))
    for tensor in views([buffer], MIXED.tensors(7)).values():
        assert tensor.data_ptr() % tensor.element_size() == 0


def test_an_mla_layout_may_have_no_values() -> None:
    layout = KVLayout(groups=(group(kind="mla", kv_heads=1, value_dim=0),))
    assert [spec.name for spec in layout.tensors(1)] == ["g0.k"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_heads": 0},
        {"dtype": "float12"},
        {"kind": "x"},
        {"layers": ()},
        {"key_dim": 1.5},
        {"x": 1},
    ],
)
def test_impossible_groups_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        group(**wrong)


def test_a_layer_stands_in_one_group_only() -> None:
    with pytest.raises(ValidationError, match="two groups"):
        KVLayout(groups=(group(), group()))


@given(
    st.integers(1, 9),
    st.lists(st.sampled_from(["float32", "bfloat16", "int8"]), min_size=1, max_size=4),
)
def test_views_and_bytes_are_inverse_and_copy_nothing(tokens: int, dtypes: list[str]) -> None:
    layout = KVLayout(groups=tuple(group(layers=(n,), dtype=d) for n, d in enumerate(dtypes)))
    buffer = memoryview(bytearray(range(256)) * (layout.bytes_per_token * tokens // 256 + 1))
    buffer = buffer[: layout.bytes_per_token * tokens]
    tensors = views([buffer], layout.tensors(tokens))
    layout.check(tensors, tokens)
    (run,) = byte_view(tensors.values())
    assert run == buffer
    buffer[0] ^= 255
    assert run[0] == buffer[0]


@given(
    st.integers(1, 9),
    st.lists(st.sampled_from(["float32", "bfloat16", "int8"]), min_size=1, max_size=4),
    st.lists(st.integers(0, 400), max_size=6),
)
def test_views_on_parts_copy_no_tensor_that_lies_in_one(
    tokens: int, dtypes: list[str], cuts: list[int]
) -> None:
    layout = KVLayout(groups=tuple(group(layers=(n,), dtype=d) for n, d in enumerate(dtypes)))
    specs = layout.tensors(tokens)
    whole = torch.arange(layout.bytes_per_token * tokens).to(torch.uint8)
    data = whole.numpy().data
    ends = [0]
    for spec in specs:
        ends.append(ends[-1] + spec.nbytes)
    cuts = sorted(cut % (data.nbytes + 1) for cut in cuts)
    places = [0, *cuts, data.nbytes]
    parts = [data[start:end] for start, end in itertools.pairwise(places)]
    tensors = views(parts, specs)
    for spec, (start, end) in zip(specs, itertools.pairwise(ends), strict=True):
        assert torch.equal(tensors[spec.name].view(-1).view(torch.uint8), whole[start:end])
        assert tensors[spec.name].data_ptr() % tensors[spec.name].element_size() == 0
    for place in ends[1:-1]:  # cut where tensors end, and nowhere else
        one, two = (views([data[:place], data[place:]], specs), views([data], specs))
        assert all(one[spec.name].data_ptr() == two[spec.name].data_ptr() for spec in specs)


def test_tensors_apart_in_memory_are_apart_in_bytes() -> None:
    one, two = torch.zeros(3), torch.ones(4)
    assert [part.nbytes for part in byte_view([one, torch.empty(0), two])] == [12, 16]
    both = torch.zeros(8)
    assert [part.nbytes for part in byte_view([both[4:], both[:4]])] == [16, 16]
    with pytest.raises(LayoutError, match="contiguous"):
        byte_view([torch.zeros(4, 4).T])


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "expected tensors"),
        ({"g0.k": torch.zeros(1)}, "expected tensors"),
        ({"g0.k": torch.zeros(1, 2, 7, 3), "g0.v": torch.zeros(1, 2, 7, 5)}, "bfloat16"),
        ({"g0.k": torch.zeros(1, 2, 6, 3).bfloat16(), "g0.v": torch.zeros(1, 2, 7, 5).bfloat16()},
         r"g0.k: expected bfloat16 \[1, 2, 7, 3\]"),
    ],
)  # fmt: skip
def test_check_says_what_does_not_fit(tensors: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        KVLayout(groups=(group(),)).check(tensors, 7)


def test_views_of_a_buffer_of_another_size_are_refused() -> None:
    with pytest.raises(LayoutError, match="the buffer has 7"):
        views([memoryview(bytearray(7))], [TensorSpec("x", "int8", (8,))])


def test_copy_exact_takes_any_strides_and_nothing_else() -> None:
    out = torch.empty(2, 3)
    copy_exact(out, torch.arange(6.0).view(3, 2).T)
    assert out.tolist() == [[0, 2, 4], [1, 3, 5]]
    for wrong in (torch.zeros(2, 3).half(), torch.zeros(3, 2), torch.zeros(3)):
        with pytest.raises(LayoutError):
            copy_exact(out, wrong)
