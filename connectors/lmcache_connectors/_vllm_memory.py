"""vLLM's KV memory: whole blocks out of it and into it, and the proof that these are the blocks.

A layer is a view [blocks, kv_heads, tokens, width] on an allocation that layers share. What lies
within a block is the attention backend's affair (the CPU's packs keys transposed), so only whole
blocks move.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from lmcache_core import ConfigError, LayerGroup, Tensors, copy_exact, point


class GroupMemory:
    """The layers of one KV cache group. A block id means the same place in each of them."""

    def __init__(self, layers: Sequence[torch.Tensor], group: LayerGroup, tokens: int) -> None:
        """Raises ConfigError where the memory is not what the group says."""
        self._layers, self._tokens = list(layers), tokens
        expected = (group.kv_heads, tokens, group.key_dim)
        for layer in self._layers:
            if tuple(layer.shape[1:]) != expected or str(layer.dtype) != f"torch.{group.dtype}":
                raise ConfigError(
                    f"expected blocks of {group.dtype} {list(expected)}; vLLM has "
                    f"{layer.dtype} {list(layer.shape[1:])}"
                )
        self._joined = _joined(self._layers)
        self._places: dict[int, int] = {}
        """Where blocks are whose number says it no more."""
        self.ready: torch.cuda.Event | None = None
        """When the blocks are there; None for now."""

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return self._layers[0].device

    def gather(self, blocks: Sequence[int], out: Tensors) -> None:
        """Copy blocks of every layer into `out`: g0.k, [layers, kv_heads, tokens, width]."""
        for n, place in enumerate(blocks):
            block = self._places.get(place, place)
            target = self._part(out, n)
            if self._joined is not None:
                copy_exact(target, self._joined[:, block])
                continue
            for number, layer in enumerate(self._layers):
                copy_exact(target[number], layer[block])

    def scatter(self, block: int, tensors: Tensors, n: int) -> None:
        """Copy the n-th block of a chunk into every layer."""
        source = self._part(tensors, n)
        if self._joined is not None:
            copy_exact(self._joined[:, block], source)
            return
        for number, layer in enumerate(self._layers):
            copy_exact(layer[block], source[number])

    def staged(self, blocks: Sequence[int]) -> GroupMemory:
        """These blocks, copied on the device as they are at this point of its work."""
        copy = GroupMemory.__new__(GroupMemory)
        index = torch.tensor(blocks, device=self.device)
        copy._layers = [layer.index_select(0, index) for layer in self._layers]
        copy._tokens, copy._joined = self._tokens, None
        copy._places = {block: n for n, block in enumerate(blocks)}
        copy.ready = point(self.device)
        return copy

    def _part(self, tensors: Tensors, n: int) -> torch.Tensor:
        """The n-th block of a chunk."""
        return tensors["g0.k"][:, :, n * self._tokens : (n + 1) * self._tokens]

    def prove(self) -> None:
        """Put a pattern through this very path, look at the memory from outside, and restore it.

        Raises ConfigError where a block's pattern is found anywhere but in that block of each
        layer, or does not come back.
        """
        blocks = self._layers[0].shape[0]
        block, others = blocks // 2, [b for b in (0, blocks // 2 - 1, blocks - 1) if b >= 0]
        shape = (len(self._layers), *self._layers[0].shape[1:])
        kept = [layer[block].clone() for layer in self._layers]
        around = [layer[b].clone() for layer in self._layers for b in others if b != block]
        pattern = _pattern(shape, self._layers[0])
        try:
            self.scatter(block, {"g0.k": pattern}, 0)
            there = all(
                _same(layer[block], part) for layer, part in zip(self._layers, pattern, strict=True)
            )
            back = torch.empty_like(pattern)
            self.gather([block], {"g0.k": back})
            after = [layer[b] for layer in self._layers for b in others if b != block]
            still = all(_same(a, b) for a, b in zip(around, after, strict=True))
            if not (there and still and _same(back, pattern)):
                raise ConfigError("blocks of vLLM's KV memory are not where they should be")
        finally:
            for layer, part in zip(self._layers, kept, strict=True):
                layer[block].copy_(part)


def _joined(layers: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """[layers, blocks, kv_heads, tokens, width] where layers lie at equal distances."""
    first = layers[0]
    if len(layers) == 1:
        return first.unsqueeze(0)
    storage = first.untyped_storage().data_ptr()
    alike = all(
        layer.untyped_storage().data_ptr() == storage
        and layer.stride() == first.stride()
        and layer.shape == first.shape
        for layer in layers
    )
    offsets = [layer.storage_offset() for layer in layers]
    steps = {b - a for a, b in itertools.pairwise(offsets)}
    if not alike or len(steps) != 1 or min(steps) <= 0:
        return None
    return first.as_strided((len(layers), *first.shape), (steps.pop(), *first.stride()))


def _pattern(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Bytes that differ from place to place, on the host."""
    count = 1
    for n in shape:
        count *= n
    data = torch.arange(count * like.element_size(), dtype=torch.int64)
    data = (data * 2654435761 >> 7) & 0x7F
    return data.to(torch.uint8).view(like.dtype).view(*shape)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit."""
    left, right = (t.cpu().contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)
