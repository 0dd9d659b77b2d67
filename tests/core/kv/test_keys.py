"""Keys: the same everywhere, another for anything that matters."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache_core import ChunkKey, KVLayout, LayerGroup, Namespace, unverified
from lmcache_core.connector import tenant_digest

GROUP = {
    "kind": "attention",
    "layers": (0, 1),
    "kv_heads": 2,
    "key_dim": 4,
    "value_dim": 4,
    "dtype": "bfloat16",
}
token_ids = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40)


def layout(**changes: object) -> KVLayout:
    return KVLayout(groups=(LayerGroup(**{**GROUP, **changes}),))


def namespace(**changes: object) -> Namespace:
    fields = {"model": "org/name", "layout": layout(), "weights": unverified("abc")}
    return Namespace(**{**fields, **changes})


@given(token_ids, st.integers(1, 8))
def test_one_key_for_each_full_chunk(ids: list[int], chunk_size: int) -> None:
    assert len(namespace().keys(ids, chunk_size)) == len(ids) // chunk_size


@given(token_ids, st.data())
def test_a_changed_token_changes_its_chunk_and_all_that_follow(
    ids: list[int], data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(ids) - 1))
    other = data.draw(st.integers(0, 2**32 - 1).filter(lambda token: token != ids[position]))
    changed = [*ids[:position], other, *ids[position + 1 :]]
    before, after = namespace().keys(ids, 4), namespace().keys(changed, 4)
    same = position // 4
    assert before[:same] == after[:same]
    assert not set(before[same:]) & set(after[same:])


@given(st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_the_same_tokens_at_another_position_are_another_chunk(block: list[int]) -> None:
    keys = namespace().keys(block * 5, 4)
    assert len(set(keys)) == 5


@given(token_ids)
def test_lists_arrays_and_tensors_of_any_integer_type_agree(ids: list[int]) -> None:
    keys = namespace().keys(ids, 4)
    for other in (tuple(ids), np.array(ids, np.uint32), np.array(ids, np.int64), torch.tensor(ids)):
        assert namespace().keys(other, 4) == keys


@pytest.mark.parametrize(
    "wrong",
    [
        [-1] * 4,
        [2**32] * 4,
        [1.5] * 4,
        ["a"] * 4,
        np.zeros((2, 2), int),
        np.zeros(4),
        torch.zeros(4),
    ],
)
def test_what_is_no_token_sequence_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="token ids"):
        namespace().keys(wrong, 2)  # type: ignore[arg-type]


CHANGES = {
    "model": "org/name2",
    "weights": unverified("abd"),
    "revision": "r",
    "rank": 1,
    "world": 2,
    "positions": "rope-1e6",
    "memory_format": "packed",
    "adapter": "lora",
    "tenant": tenant_digest("salt"),
    "extra": {"plugin": "x"},
    "layout": layout(layers=(0, 1, 2)),
}
LAYOUT_CHANGES = {
    "kind": "mla",
    "layers": (0, 2),
    "kv_heads": 3,
    "key_dim": 5,
    "value_dim": 5,
    "dtype": "float16",
    "window": 9,
}


def test_every_field_of_a_namespace_is_tried_here() -> None:
    assert set(CHANGES) == set(Namespace.model_fields)
    assert set(LAYOUT_CHANGES) == set(LayerGroup.model_fields)


def test_any_change_of_any_field_gives_other_keys() -> None:
    variants = [namespace(), *(namespace(**{k: v}) for k, v in CHANGES.items())]
    variants += [namespace(layout=layout(**{k: v})) for k, v in LAYOUT_CHANGES.items()]
    keys = [variant.keys([1, 2, 3, 4], 4)[0] for variant in variants]
    assert len(set(keys)) == len(keys)


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_text_does_not_flow_from_one_field_into_the_next(a: str, b: str, c: str, d: str) -> None:
    one, two = namespace(model=a, adapter=b), namespace(model=c, adapter=d)
    assert (one.digest == two.digest) == ((a, b) == (c, d))


@pytest.mark.parametrize("model", ["a@b/c", "", "模型/🦙", "m" * 300, 'q"uo\\te', "new\nline\x00"])
def test_key_text_and_document_round_trip_for_any_model_name(model: str) -> None:
    ns = namespace(model=model)
    key = ns.keys([1, 2, 3, 4], 4)[0]
    assert ChunkKey.parse(str(key)) == key
    assert len(str(key)) == 64
    assert Namespace.from_document(ns.document) == ns


@given(st.text())
def test_only_the_text_of_a_key_parses(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - its own text may be anything
        ChunkKey.parse(text)
    with pytest.raises(ValueError, match="not the text"):
        ChunkKey.parse("AB" * 32)


def test_keys_are_the_same_in_another_process_with_another_hash_seed() -> None:
    program = (
        "from lmcache_core import *\n"
        f"layout = KVLayout(groups=(LayerGroup(**{GROUP!r}),))\n"
        "ns = Namespace(model='org/name', layout=layout, weights=unverified('abc'), extra={'b': '1', 'a': '2'})\n"
        "print(ns.keys(list(range(64)), 16)[-1])"
    )
    expected = str(namespace(extra={"a": "2", "b": "1"}).keys(range(64), 16)[-1])
    for seed in ("0", "1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run(
            [sys.executable, "-c", program], env=environment, check=True, capture_output=True
        )
        assert out.stdout.decode().strip() == expected


def test_the_key_scheme_does_not_drift() -> None:
    """A change here orphans every store in the field: it needs a new FRAME_VERSION."""
    golden = "934f5ce1aaf63cd79e9e929a47d78143b0b7db665ae8719227d08365b6989c16"
    assert str(namespace().keys([1, 2, 3, 4], 4)[0]) == golden


def test_an_engines_own_block_hashes_give_keys_too() -> None:
    keys = namespace().keys_from_hashes([b"one", b"two"])
    assert keys == namespace().keys_from_hashes([b"one", b"two"])
    assert len({*keys, *namespace(rank=1).keys_from_hashes([b"one", b"two"])}) == 4
    assert not set(keys) & set(namespace().keys([1, 2, 3, 4], 2))


def test_keys_travel_between_processes() -> None:
    keys = namespace().keys(range(8), 4)
    again = pickle.loads(pickle.dumps(keys))
    assert again == keys
    assert all(type(key) is ChunkKey for key in again)
    assert pickle.loads(pickle.dumps(namespace())).digest == namespace().digest


def test_a_changed_copy_of_a_namespace_has_its_own_keys() -> None:
    one = namespace()
    assert one.digest  # computed, and not to be taken along
    two = one.model_copy(update={"adapter": "lora"})
    assert two.digest == namespace(adapter="lora").digest != one.digest
    with pytest.raises(ValueError, match="rank"):
        one.model_copy(update={"rank": -1})


def test_a_tenants_salt_is_not_in_the_document() -> None:
    assert b"s3cret" not in namespace(tenant=tenant_digest("s3cret")).document
    with pytest.raises(ValueError, match="tenant"):
        namespace(tenant="s3cret")
