"""Chunks and layouts for tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from lmcache_core.kv.chunk import Chunk
from lmcache_core.kv.layout import DTYPES, KVLayout, LayerGroup, Tensors
from lmcache_core.kv.namespace import Namespace
from lmcache_core.kv.weights import unverified


def tiny_layout(dtype: str = "bfloat16") -> KVLayout:
    """Two attention layers with two KV heads of dimension 8."""
    group = LayerGroup(
        kind="attention", layers=(0, 1), kv_heads=2, key_dim=8, value_dim=8, dtype=dtype
    )
    return KVLayout(groups=(group,))


def layouts(
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16"),
) -> st.SearchStrategy[KVLayout]:
    """Layouts of one to three groups: attention, sliding and MLA, odd dimensions, mixed dtypes."""
    return st.lists(_shapes(dtypes), min_size=1, max_size=3).map(_layout)


def _shapes(dtypes: tuple[str, ...]) -> st.SearchStrategy[dict[str, object]]:
    common = {"count": st.integers(1, 3), "dtype": st.sampled_from(dtypes)}
    dims = {"key_dim": st.integers(1, 9), "value_dim": st.integers(1, 9)}
    heads = {"kv_heads": st.integers(1, 3)}
    return st.one_of(
        st.fixed_dictionaries({**common, **dims, **heads, "kind": st.just("attention")}),
        st.fixed_dictionaries(
            {**common, **dims, **heads, "kind": st.just("sliding"), "window": st.integers(1, 9)}
        ),
        st.fixed_dictionaries(
            {
                **common,
                "kind": st.just("mla"),
                "kv_heads": st.just(1),
                "key_dim": st.integers(1, 17),
                "value_dim": st.integers(0, 5),
            }
        ),
    )


def _layout(shapes: list[dict[str, object]]) -> KVLayout:
    groups: list[LayerGroup] = []
    first = 0
    for shape in shapes:
        fields = dict(shape)
        count = int(str(fields.pop("count")))
        groups.append(LayerGroup.model_validate({**fields, "layers": range(first, first + count)}))
        first += count
    return KVLayout(groups=tuple(groups))


def random_tensors(layout: KVLayout, tokens: int, seed: int = 0) -> Tensors:
    """Normal values in a chunk's shapes, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        spec.name: torch.randn(spec.shape, generator=generator).to(DTYPES[spec.dtype])
        for spec in layout.tensors(tokens)
    }


def make_chunk(layout: KVLayout, tokens: int, index: int = 0, seed: int = 0) -> Chunk:
    """A chunk of random KV under its true key."""
    namespace = Namespace(model="test", layout=layout, weights=unverified("test"))
    key = namespace.keys(range(tokens * (index + 1)), tokens)[index]
    return Chunk(key, namespace, index, tokens, random_tensors(layout, tokens, seed))
