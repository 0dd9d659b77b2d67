"""What the core's tests share: a small layout, and chunks whose content is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lmcache_core import Chunk, KVLayout, LayerGroup, Namespace, Tensors, unverified


@pytest.fixture(scope="session")
def layout() -> KVLayout:
    """Two layers of two KV heads: 64 bytes a token."""
    group = LayerGroup(
        kind="attention", layers=(0, 1), kv_heads=2, key_dim=4, value_dim=4, dtype="bfloat16"
    )
    return KVLayout(groups=(group,))


@pytest.fixture(scope="session")
def namespace(layout: KVLayout) -> Namespace:
    return Namespace(model="org/model@main", layout=layout, weights=unverified("w"))


def content(namespace: Namespace, index: int, tokens: int) -> Tensors:
    """The KV that chunk `index` has in these tests: random, the same every time."""
    generator = torch.Generator().manual_seed(index)
    return {
        spec.name: torch.randn(spec.shape, generator=generator).to(torch.bfloat16)
        for spec in namespace.layout.tensors(tokens)
    }


@pytest.fixture
def gather(namespace: Namespace) -> Callable[[int, Tensors], None]:
    """What an engine does when asked for chunk `index`."""

    def fill(index: int, out: Tensors) -> None:
        for name, tensor in content(namespace, index, out["g0.k"].shape[2]).items():
            out[name].copy_(tensor)

    return fill


@pytest.fixture
def is_right(namespace: Namespace) -> Callable[[Chunk], bool]:
    """Whether a chunk holds exactly what `gather` put there."""

    def check(chunk: Chunk) -> bool:
        expected = content(namespace, chunk.index, chunk.tokens)
        return all(torch.equal(chunk.tensors[name], expected[name]) for name in expected)

    return check
