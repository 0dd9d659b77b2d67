"""Paged memory: an engine's blocks of KV, out of its memory and into it, and the proof that these
are the blocks.

A layer is a view [blocks, kv_heads, tokens, width] on memory that layers may share. What lies
within a block is the engine's affair (vLLM's CPU backend packs keys transposed), so only whole
blocks move.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from lmcache_core.errors import ConfigError
from lmcache_core.io.device import record_event
from lmcache_core.kv.layout import LayerGroup, Tensors
from lmcache_core.kv.tensors import copy_exact


class Packing(Protocol):
    """The way between blocks as an engine packs them, [layers, kv_heads, tokens, width], and keys
    and values, [layers, kv_heads, tokens, dim]; no values: MLA."""

    def unpack(self, block: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, /) -> None:
        """Copy a block into `k` and `v`."""

    def pack(self, k: torch.Tensor, v: torch.Tensor | None, block: torch.Tensor, /) -> None:
        """The inverse: copy `k` and `v` into a block, in place."""


class PagedMemory:
    """The layers of one group of an engine's. A block's number means the same place in each."""

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        group: LayerGroup,
        tokens: int,
        packing: Packing | None = None,
    ) -> None:
        """`tokens`: of a block. `packing`: how chunks in the canonical layout come of blocks;
        without it a chunk is the blocks' bytes. Raises ConfigError where the memory is not what
        the group says."""
        self._layers, self._tokens, self._packing = list(layers), tokens, packing
        expected = (group.kv_heads, tokens, group.key_dim + group.value_dim)
        for layer in self._layers:
            if tuple(layer.shape[1:]) != expected or str(layer.dtype) != f"torch.{group.dtype}":
                raise ConfigError(
                    f"expected blocks of {group.dtype} {list(expected)}; found "
                    f"{layer.dtype} {list(layer.shape[1:])}"
                )
        self._key_dim = group.key_dim
        self._joined = _joined(self._layers)
        self._places: dict[int, int] = {}
        """Where blocks are whose number says it no more."""
        self.ready: torch.cuda.Event | None = None
        """When the blocks are there; None for now."""

    def __repr__(self) -> str:
        blocks = list(self._layers[0].shape)
        return f"PagedMemory({len(self._layers)} layers of {blocks} on {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return self._layers[0].device

    def gather(self, blocks: Sequence[int], out: Tensors) -> None:
        """Copy blocks of every layer into a chunk's tensors."""
        for n, place in enumerate(blocks):
            parts = self._parts(out, n)
            for block, part in self._views(self._places.get(place, place), parts):
                if self._packing:
                    self._packing.unpack(block, *part)
                else:
                    copy_exact(part[0], block)

    def scatter(self, block: int, tensors: Tensors, n: int) -> None:
        """Copy the n-th block of a chunk into every layer."""
        for target, part in self._views(block, self._parts(tensors, n)):
            if self._packing:
                self._packing.pack(*part, target)
            else:
                copy_exact(target, part[0])

    def _parts(self, tensors: Tensors, n: int) -> _Parts:
        """The n-th block of a chunk: keys and values, or the bytes of both."""
        tokens = slice(n * self._tokens, (n + 1) * self._tokens)
        values = tensors["g0.v"][:, :, tokens] if "g0.v" in tensors else None
        return tensors["g0.k"][:, :, tokens], values

    def _views(self, block: int, parts: _Parts) -> Iterator[tuple[torch.Tensor, _Parts]]:
        """The block in the engine's memory beside the chunk's part: of all layers at once where
        they lie at equal distances, else of one after the other."""
        if self._joined is not None:
            yield self._joined[:, block], parts
            return
        for n, layer in enumerate(self._layers):
            keys, values = (None if part is None else part[n : n + 1] for part in parts)
            assert keys is not None
            yield layer[block].unsqueeze(0), (keys, values)

    def staged(self, blocks: Sequence[int]) -> PagedMemory:
        """These blocks, copied on the device as they are at this point of its work."""
        twin = copy.copy(self)
        index = torch.tensor(blocks, device=self._layers[0].device)
        twin._layers = [layer.index_select(0, index) for layer in self._layers]
        twin._joined = None
        twin._places = {block: n for n, block in enumerate(blocks)}
        twin.ready = record_event(self.device)
        return twin

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
        chunk, back = self._chunk_of(pattern), self._chunk_of(torch.zeros_like(pattern))
        try:
            self.scatter(block, chunk, 0)
            there = all(
                _same(layer[block], part) for layer, part in zip(self._layers, pattern, strict=True)
            )
            self.gather([block], back)
            after = [layer[b] for layer in self._layers for b in others if b != block]
            still = all(_same(a, b) for a, b in zip(around, after, strict=True))
            same = all(_same(back[name], tensor) for name, tensor in chunk.items())
            if not (there and still and same):
                raise ConfigError("blocks of the engine's KV memory are not where they should be")
        finally:
            for layer, part in zip(self._layers, kept, strict=True):
                layer[block].copy_(part)

    def _chunk_of(self, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        """A chunk of one block that has these bytes, [layers, kv_heads, tokens, width]."""
        if not self._packing:
            return {"g0.k": blocks}
        keys, values = (
            torch.empty(*blocks.shape[:3], dim, dtype=blocks.dtype)
            for dim in (self._key_dim, blocks.shape[3] - self._key_dim)
        )
        self._packing.unpack(blocks, keys, values if values.numel() else None)
        return {"g0.k": keys, "g0.v": values} if values.numel() else {"g0.k": keys}


_Parts = tuple[torch.Tensor, torch.Tensor | None]


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
    data = torch.arange(math.prod(shape) * like.element_size(), dtype=torch.int64)
    data = (data * 2654435761 >> 7) & 0x7F
    return data.to(torch.uint8).view(like.dtype).view(*shape)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit."""
    left, right = (t.cpu().contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)
