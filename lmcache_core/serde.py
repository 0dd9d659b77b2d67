"""What the author of a serde uses: the three kinds of Serde, and the helpers that go with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lmcache_core.errors import ConfigError, FrameError, LayoutError
from lmcache_core.io.buffers import Buffers, concat, split_at
from lmcache_core.io.daemon_pool import DaemonPool
from lmcache_core.io.device import pooled_empty
from lmcache_core.kv.layout import DTYPES, KVLayout, LayerGroup, Tensors, TensorSpec, dtype_name
from lmcache_core.kv.tensors import byte_array, byte_view, views
from lmcache_core.plugins.options import Options

__all__ = [
    "DTYPES",
    "Buffers",
    "BytesToBytes",
    "ChunkInfo",
    "ConfigError",
    "DaemonPool",
    "FrameError",
    "KVLayout",
    "LayerGroup",
    "LayoutError",
    "Options",
    "Serde",
    "TensorSpec",
    "Tensors",
    "TensorsToBytes",
    "TensorsToTensors",
    "byte_array",
    "byte_view",
    "concat",
    "dtype_name",
    "pooled_empty",
    "split_at",
    "views",
]


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """What a tensors-to-tensors serde may know of the chunk besides its tensors."""

    layout: KVLayout
    tokens: int
    index: int
    """Place in the sequence; 0 holds the first tokens."""


class Serde(ABC):
    """Base of the three kinds. Instances are immutable and used from several threads.

    Decoding must raise, with any exception, for a payload that it did not produce: that is a
    miss. `options` go into every frame, so a frame decodes whatever the config says today.
    """

    name: ClassVar[str]
    """The entry point's name; frames carry it."""
    Options: ClassVar[type[Options]] = Options
    absent: ClassVar[Mapping[str, object]] = {}
    """Options that frames of its earlier versions lack, and what those frames do instead."""

    def __init__(self, options: Any) -> None:
        self.options: Any = options


class TensorsToTensors(Serde):
    """Such as a quantizer: codes and scales for values. Runs where the tensors live."""

    @abstractmethod
    def encode(self, tensors: Tensors, info: ChunkInfo) -> Tensors:
        """Other tensors, under any names."""

    @abstractmethod
    def decode(self, tensors: Tensors, info: ChunkInfo) -> Tensors:
        """The tensors that `info.layout` names, in its shapes and dtypes."""


class TensorsToBytes(Serde):
    """Such as raw or safetensors: how tensors lie in bytes. Tensors are contiguous, on the host."""

    @abstractmethod
    def encode(self, tensors: Tensors) -> list[memoryview]:
        """The payload as buffers; views on the tensors where possible."""

    @abstractmethod
    def decode(self, parts: Buffers, specs: Sequence[TensorSpec]) -> Tensors:
        """Tensors of exactly these specs; views on the parts where possible. The payload may be
        cut into other parts than it was encoded as."""


class BytesToBytes(Serde):
    """Such as zstd or encryption."""

    @abstractmethod
    def encode(self, parts: Buffers, context: bytes) -> list[memoryview]:
        """The payload transformed. `context` says whose it is (key, place, chain, namespace);
        it is stored beside the payload and given to decode again, for authentication."""

    @abstractmethod
    def decode(
        self,
        parts: Buffers,
        context: bytes,
        allocate: Callable[[int], memoryview],
        limit: int,
    ) -> list[memoryview]:
        """The payload that was encoded, which has at most `limit` bytes, as any parts."""
