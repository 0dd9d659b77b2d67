"""Rows: an engine's own rows of host memory, stored under keys of the engine's.

An engine that keeps KV in rows of its own packing (vLLM's offloading, SGLang's host pool) asks a
store for nothing but to keep a row and to give it back. A row is a chunk of one token that is as
wide as the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch

from lmcache_core.engine.engine import CacheEngine
from lmcache_core.engine.hit import Hit
from lmcache_core.errors import ConfigError
from lmcache_core.kv.filling import whole
from lmcache_core.kv.keys import ChunkKey
from lmcache_core.kv.layout import KVLayout, LayerGroup, Tensors
from lmcache_core.kv.tensors import copy_exact

NAME = "g0.k"
"""The one tensor of a row's chunk."""


def row_layout(nbytes: int) -> KVLayout:
    """The layout of rows of `nbytes` bytes whose packing is the engine's affair."""
    row = LayerGroup(
        kind="opaque", layers=(0,), kv_heads=1, key_dim=nbytes, value_dim=0, dtype="uint8"
    )
    return KVLayout(groups=(row,))


class Rows:
    """Rows of host memory and the cache behind them. Its methods may be called from any thread."""

    def __init__(
        self, rows: torch.Tensor, cache: CacheEngine, namespace: Mapping[str, Any]
    ) -> None:
        """`rows`: uint8 [rows, bytes], the engine's memory. `namespace`: fields of the Namespace,
        all but the layout. Raises ConfigError for a cache whose chunks are not rows, and where a
        tier cannot hold one."""
        if cache.chunk_size != 1:
            raise ConfigError(f"chunk_size: expected 1, a row; found {cache.chunk_size}")
        self._rows, self._cache = rows, cache
        self.namespace = cache.namespace(**namespace, layout=row_layout(rows.shape[1]))

    def __repr__(self) -> str:
        count, nbytes = self._rows.shape
        return f"Rows({count} of {nbytes} bytes, {self._cache!r})"

    def keys(self, hashes: Sequence[bytes]) -> list[ChunkKey]:
        """Our keys for the engine's; each of these stands for the whole prefix up to its row."""
        return self.namespace.keys_from_hashes(hashes)

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which of `keys` are stored."""
        return [tier is not None for tier in self._cache.locate(keys)]

    def load(self, prefix: Sequence[ChunkKey], first: int, ids: Sequence[int]) -> int:
        """Load the keys of `prefix` from `first` on into the rows `ids`; returns how many, in
        order, came."""
        asked = prefix[first:]
        one = len(self._cache.tiers) == 1  # the engine has just heard that it is there
        where = [0] * len(asked) if one else self._cache.locate(asked)
        tiers = tuple(n for n in takewhile(lambda n: n is not None, where) if n is not None)
        hit, count = Hit(tuple(prefix), (0,) * first + tiers), 0
        for chunk in self._cache.load(hit, start=first, shared=True):
            copy_exact(self._rows[ids[count]], chunk.tensors[NAME].view(-1))
            count += 1
        return count

    def store(self, prefix: Sequence[ChunkKey], first: int, ids: Sequence[int]) -> int:
        """Store the rows `ids` under the keys of `prefix` from `first` on; the cache counts what
        it drops. Returns how many were offered."""

        @whole
        def gather(index: int, out: Tensors) -> None:
            copy_exact(out[NAME].view(-1), self._rows[ids[index - first]])

        self._cache.store(self.namespace, prefix, gather, start=first, tokens=1)
        return len(ids)

    def close(self) -> None:
        """Let go of the engine's memory; nothing is loaded or stored any more."""
        self._rows = self._rows.new_empty((0, self._rows.shape[1]))

    def rename(self, **fields: Any) -> None:
        """Store and find from now on under a Namespace of other fields."""
        self.namespace = self.namespace.model_copy(update=fields)
