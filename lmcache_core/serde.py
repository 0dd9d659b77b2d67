"""Serde: one step between a chunk's tensors and a frame's payload; and chains of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lmcache_core.backend import Options
from lmcache_core.layout import KVLayout, Tensors, TensorSpec
from lmcache_core.parts import Parts


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
    def decode(self, parts: Parts, specs: Sequence[TensorSpec]) -> Tensors:
        """Tensors of exactly these specs; views on the parts where possible. The payload may be
        cut into other parts than it was encoded as."""


class BytesToBytes(Serde):
    """Such as zstd or encryption."""

    @abstractmethod
    def encode(self, parts: Parts, context: bytes) -> list[memoryview]:
        """The payload transformed. `context` says whose it is (key, place, chain, namespace);
        it is stored beside the payload and given to decode again, for authentication."""

    @abstractmethod
    def decode(
        self,
        parts: Parts,
        context: bytes,
        allocate: Callable[[int], memoryview],
        limit: int,
    ) -> list[memoryview]:
        """The payload that was encoded, which has at most `limit` bytes, as any parts."""
