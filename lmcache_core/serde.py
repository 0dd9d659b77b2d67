"""What the author of a serde uses: the three kinds of Serde, and the helpers that go with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict

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
    "FrameOptions",
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
    """Position in the sequence; 0 holds the first tokens."""


class FrameOptions(BaseModel):
    """Base of what frames record of a serde's options: what decoding cannot do without.

    Whoever may write to a store chooses it. So a field is a bool, an int, a float, a Literal or a
    tuple of these, and nothing that could name a file, a variable or a host: a class with any other
    field is a TypeError where it is defined. A field that is added later has a default, which
    stands for the frames without it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse fields that a stranger could do more with than choose a number."""
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            if not _is_harmless(field.annotation):
                raise TypeError(
                    f"{cls.__name__}.{name}: a frame is a stranger's; it may choose numbers and "
                    f"words of a list, not {field.annotation}"
                )


def _is_harmless(annotation: Any) -> bool:
    if get_origin(annotation) is tuple:
        return all(each is Ellipsis or _is_harmless(each) for each in get_args(annotation))
    return annotation in (bool, int, float) or get_origin(annotation) is Literal


class Serde(ABC):
    """Base of the three kinds. Instances are immutable and used from several threads.

    Decoding must raise, with any exception, for a payload that it did not produce: that is a
    miss. Payload, shapes and what is `Recorded` may be a stranger's.
    """

    name: ClassVar[str]
    """The entry point's name; frames carry it."""
    Options: ClassVar[type[Options]] = Options
    """What the config may say."""
    Recorded: ClassVar[type[FrameOptions]] = FrameOptions
    """What frames record of it; nothing, unless decoding needs something."""
    known_size: ClassVar[bool] = False
    """Shapes and dtypes alone tell the size of what finite numbers become."""

    def __init__(self, options: Any) -> None:
        self.options: Any = options

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.frame_options()!r})"

    def frame_options(self) -> FrameOptions:
        """What frames record: those options that `Recorded` names."""
        fields = self.Recorded.model_fields
        return self.Recorded(**{name: getattr(self.options, name) for name in fields})

    def for_frame(self, recorded: FrameOptions) -> Self:
        """The serde that decodes a frame that recorded this; otherwise as the config made it.

        Called on the tier's own serde where it has one of this name, else on one of default
        options. Raises FrameError, "unreadable", where this process cannot decode it.
        """
        if recorded == self.frame_options():
            return self
        return type(self)(self.Options.model_validate({**dict(self.options), **dict(recorded)}))


class TensorsToTensors(Serde):
    """Such as a quantizer: codes and scales for values. Runs where the tensors live."""

    keeps_input: ClassVar[bool] = False
    """It never writes to the tensors that it is given. Without that word it gets copies, for a
    memory tier may hold them."""

    @abstractmethod
    def encode(self, tensors: Tensors, info: ChunkInfo) -> Tensors:
        """Other tensors, under any names."""

    @abstractmethod
    def decode(self, tensors: Tensors, info: ChunkInfo) -> Tensors:
        """The tensors that `info.layout` names, in its shapes and dtypes.

        Names, dtypes and shapes of `tensors` are the frame's. Compare them with what `encode` makes
        before computing: broadcasting turns two small tensors into a large one.
        """


class TensorsToBytes(Serde):
    """Such as raw or safetensors: how tensors lie in bytes. Tensors are contiguous, on the host."""

    keeps_input: ClassVar[bool] = False
    """As for TensorsToTensors."""

    @abstractmethod
    def encode(self, tensors: Tensors) -> list[memoryview]:
        """The payload as buffers; views on the tensors where possible."""

    @abstractmethod
    def decode(self, parts: Buffers, specs: Sequence[TensorSpec]) -> Tensors:
        """Tensors of exactly these specs; views on the parts where possible. The payload may be
        cut into other parts than it was encoded as. Allocate no more than `specs` and a payload
        that fits them take."""


class BytesToBytes(Serde):
    """Such as zstd or encryption. Parts are read-only: a memory tier may hold them."""

    seals: ClassVar[bool] = False
    """Decoding proves, for payload and context, that a key from the config made them. A tier whose
    last step it is takes nothing else."""

    @abstractmethod
    def encode(self, parts: Buffers, context: bytes) -> list[memoryview]:
        """The payload transformed. `context` says whose it is (key, tokens, index, and the frame's
        header: pipeline, shapes, namespace); it is stored beside the payload and given to decode
        again, for authentication."""

    @abstractmethod
    def decode(
        self,
        parts: Buffers,
        context: bytes,
        allocate: Callable[[int], memoryview],
        limit: int,
    ) -> list[memoryview]:
        """The payload that was encoded, which has at most `limit` bytes, as any parts. Look at what
        the payload says of its size, and at what really comes, before taking memory for it;
        `allocate` refuses more than `limit`."""
