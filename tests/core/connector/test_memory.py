"""An engine's blocks of KV memory, in whatever way its layers lie."""

from __future__ import annotations

import pytest
import torch

from lmcache_core import ConfigError, LayerGroup, Tensors
from lmcache_core.connector import PagedMemory

LAYERS, BLOCKS, HEADS, TOKENS, DIM = 3, 6, 2, 4, 5
SHAPE = (BLOCKS, HEADS, TOKENS, 2 * DIM)


def apart() -> list[torch.Tensor]:
    """Each layer in memory of its own."""
    return [torch.rand(SHAPE) for _ in range(LAYERS)]


def together() -> list[torch.Tensor]:
    """One allocation, a layer after the other."""
    return list(torch.rand(LAYERS, *SHAPE))


def side_by_side() -> list[torch.Tensor]:
    """One allocation, in which each block holds all layers, and heads lie within tokens."""
    whole = torch.rand(BLOCKS, LAYERS, TOKENS, HEADS, 2 * DIM)
    return [whole[:, n].transpose(1, 2) for n in range(LAYERS)]


def uneven() -> list[torch.Tensor]:
    """One allocation with something between two of the layers."""
    whole = torch.rand(LAYERS + 1, *SHAPE)
    return [whole[0], whole[1], whole[3]]


WAYS = pytest.mark.parametrize("ways", [apart, together, side_by_side, uneven])


def group(kind: str = "opaque") -> LayerGroup:
    width = {"key_dim": DIM, "value_dim": DIM} if kind == "attention" else {"key_dim": 2 * DIM}
    sizes = {"value_dim": 0, **width}
    return LayerGroup(kind=kind, layers=range(LAYERS), kv_heads=HEADS, dtype="float32", **sizes)


class KeysLast:
    """An engine that packs values before keys."""

    def unpack(self, block: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, /) -> None:
        v.copy_(block[..., :DIM])
        k.copy_(block[..., DIM:])

    def pack(self, k: torch.Tensor, v: torch.Tensor | None, block: torch.Tensor, /) -> None:
        block[..., :DIM] = v
        block[..., DIM:] = k


def chunk_of(blocks: int, width: int = 2 * DIM) -> torch.Tensor:
    return torch.zeros(LAYERS, HEADS, blocks * TOKENS, width)


@WAYS
def test_blocks_come_out_and_go_into_other_blocks(ways) -> None:
    layers = ways()
    memory = PagedMemory(layers, group(), TOKENS)
    chunk: Tensors = {"g0.k": chunk_of(2)}
    memory.gather([4, 1], chunk)
    for n, layer in enumerate(layers):
        assert torch.equal(chunk["g0.k"][n], torch.cat([layer[4], layer[1]], dim=1))
    before = [layer.clone() for layer in layers]
    memory.scatter(3, chunk, 1)
    for layer, was in zip(layers, before, strict=True):
        assert torch.equal(layer[3], was[1])
        assert torch.equal(layer[[0, 1, 2, 4, 5]], was[[0, 1, 2, 4, 5]])


@WAYS
def test_keys_and_values_through_the_engines_packing(ways) -> None:
    layers = ways()
    memory = PagedMemory(layers, group("attention"), TOKENS, KeysLast())
    chunk: Tensors = {"g0.k": chunk_of(1, DIM), "g0.v": chunk_of(1, DIM)}
    memory.gather([2], chunk)
    for n, layer in enumerate(layers):
        assert torch.equal(chunk["g0.v"][n], layer[2, :, :, :DIM])
        assert torch.equal(chunk["g0.k"][n], layer[2, :, :, DIM:])
    memory.scatter(5, chunk, 0)
    assert all(torch.equal(layer[5], layer[2]) for layer in layers)


@WAYS
def test_staged_blocks_are_as_they_were(ways) -> None:
    layers = ways()
    staged = PagedMemory(layers, group(), TOKENS).staged([5, 2])
    before = [layer[[5, 2]].clone() for layer in layers]
    for layer in layers:
        layer.zero_()
    chunk: Tensors = {"g0.k": chunk_of(2)}
    staged.gather([5, 2], chunk)
    for n, was in enumerate(before):
        assert torch.equal(chunk["g0.k"][n], torch.cat([was[0], was[1]], dim=1))


@WAYS
@pytest.mark.parametrize("packing", [None, KeysLast()])
def test_the_proof_leaves_memory_as_it_was(ways, packing) -> None:
    layers = ways()
    before = [layer.clone() for layer in layers]
    PagedMemory(layers, group("attention" if packing else "opaque"), TOKENS, packing).prove()
    assert all(torch.equal(layer, was) for layer, was in zip(layers, before, strict=True))


def one_for_two() -> list[torch.Tensor]:
    layer = torch.rand(SHAPE)
    return [layer, layer, torch.rand(SHAPE)]


def blocks_that_overlap() -> list[torch.Tensor]:
    """Each begins where half of the one before it is over."""
    size = HEADS * TOKENS * 2 * DIM
    strides = (size // 2, TOKENS * 2 * DIM, 2 * DIM, 1)
    flat = torch.rand(LAYERS, BLOCKS * size)
    return [each.as_strided(SHAPE, strides, each.storage_offset()) for each in flat]


@pytest.mark.parametrize("ways", [one_for_two, blocks_that_overlap])
def test_memory_in_which_blocks_are_not_apart_is_noticed(ways) -> None:
    with pytest.raises(ConfigError, match="not where they should be"):
        PagedMemory(ways(), group(), TOKENS).prove()


def test_a_packing_that_loses_something_is_noticed() -> None:
    class Forgets(KeysLast):
        def pack(self, k: torch.Tensor, v: torch.Tensor | None, block: torch.Tensor, /) -> None:
            super().pack(k, v, block)
            block[..., 0] = 0

    with pytest.raises(ConfigError, match="not where they should be"):
        PagedMemory(apart(), group("attention"), TOKENS, Forgets()).prove()


@pytest.mark.parametrize(
    "other", [torch.rand(BLOCKS, HEADS, TOKENS, DIM), torch.rand(SHAPE).half()]
)
def test_memory_of_another_shape_or_dtype_is_refused(other: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"expected blocks of float32 \[2, 4, 10\]; found"):
        PagedMemory([*apart()[:2], other], group(), TOKENS)
