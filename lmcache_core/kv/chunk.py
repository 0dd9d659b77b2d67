"""Chunk: the unit of storage."""

from __future__ import annotations

from dataclasses import dataclass

from lmcache_core.kv.keys import ChunkKey
from lmcache_core.kv.layout import Tensors
from lmcache_core.kv.namespace import Namespace


@dataclass(frozen=True, slots=True)
class Chunk:
    """The KV of `tokens` consecutive tokens. Tensors lie on the host."""

    key: ChunkKey
    namespace: Namespace
    index: int
    tokens: int
    tensors: Tensors

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
