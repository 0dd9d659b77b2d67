"""raw: tensors one behind the other, with no copy in either direction."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_core.serde import Buffers, Tensors, TensorSpec, TensorsToBytes, byte_view, views


class Raw(TensorsToBytes):
    """The tensors' own memory. Tensors that already lie behind each other become one buffer."""

    name = "raw"
    known_size = True
    keeps_input = True

    def encode(self, tensors: Tensors) -> list[memoryview]:
        return byte_view(tensors.values())

    def decode(self, parts: Buffers, specs: Sequence[TensorSpec]) -> Tensors:
        return views(parts, specs)
