"""Pipeline: the steps from a chunk's tensors to a frame's payload, and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache

from pydantic import ValidationError

from lmcache_core.errors import ConfigError, FrameError
from lmcache_core.io.buffers import Buffers
from lmcache_core.io.device import to_host
from lmcache_core.io.memory import HOST
from lmcache_core.kv.layout import KVLayout, Tensors, TensorSpec
from lmcache_core.plugins.registry import component
from lmcache_core.serde import BytesToBytes, ChunkInfo, Serde, TensorsToBytes, TensorsToTensors

Step = tuple[str, str]
"""A serde's name and its options as canonical JSON: what a frame records."""


class Pipeline:
    """Tensors-to-tensors steps, exactly one tensors-to-bytes step, bytes-to-bytes steps.

    A missing middle is `raw`. Raises ConfigError for an impossible order.
    """

    def __init__(self, serdes: Sequence[Serde]) -> None:
        self.steps = _complete(serdes)
        self.middle = next(s for s in self.steps if isinstance(s, TensorsToBytes))
        self.before = [s for s in self.steps if isinstance(s, TensorsToTensors)]
        self.after = [s for s in self.steps if isinstance(s, BytesToBytes)]
        self.spec: tuple[Step, ...] = tuple(
            (s.name, json.dumps(s.options.model_dump(mode="json"), sort_keys=True))
            for s in self.steps
        )

    @classmethod
    def from_spec(cls, spec: tuple[Step, ...]) -> Pipeline:
        """The chain that a frame records. Raises ConfigError for an unknown serde."""
        return _from_spec(spec)

    def to_tensors(self, tensors: Tensors, info: ChunkInfo) -> Tensors:
        """Run the tensors-to-tensors steps, then bring the result to the host, contiguous."""
        for serde in self.before:
            tensors = serde.encode(tensors, info)
        return {name: to_host(tensor) for name, tensor in tensors.items()}

    def to_payload(self, tensors: Tensors, context: bytes) -> list[memoryview]:
        """The payload of host tensors, as buffers that follow each other."""
        parts = self.middle.encode(tensors)
        for serde in self.after:
            parts = serde.encode(parts, context)
        return parts

    def fits(self, specs: Sequence[TensorSpec], layout: KVLayout, tokens: int) -> bool:
        """Whether `specs` can be what a chunk of `tokens` tokens becomes before the middle."""
        return bool(self.before) or set(specs) == set(layout.tensors(tokens))

    def decode(
        self,
        payload: Buffers,
        specs: Sequence[TensorSpec],
        info: ChunkInfo,
        context: bytes,
    ) -> Tensors:
        """The chunk's tensors. Raises FrameError for a payload that this chain did not make."""
        try:
            for last in reversed(self.after):
                limit = 2 * sum(spec.nbytes for spec in specs) + (1 << 20)  # the middle's header
                payload = last.decode(payload, context, HOST.allocate, limit)
            tensors = self.middle.decode(payload, specs)
            for first in reversed(self.before):
                tensors = first.decode(tensors, info)
            if self.before:  # without such a step the specs are the layout's: `fits` has checked
                info.layout.check(tensors, info.tokens)
        except Exception as error:  # a payload may be anything, and so may its serde's exception
            raise FrameError(f"payload does not decode: {error!r}") from error
        return tensors


def _complete(serdes: Sequence[Serde]) -> list[Serde]:
    kinds = [_kind(serde) for serde in serdes]
    names = ", ".join(serde.name for serde in serdes)
    if kinds != sorted(kinds):
        raise ConfigError(
            f"impossible serde order [{names}]: tensor steps come first, then one of "
            "raw, byteplane or safetensors, then byte steps such as zstd"
        )
    if kinds.count(1) > 1:
        raise ConfigError(f"two steps of [{names}] turn tensors into bytes; one is enough")
    if 1 in kinds:
        return list(serdes)
    raw = component("serdes", "raw")
    middle = kinds.count(0)
    return [*serdes[:middle], raw(raw.Options()), *serdes[middle:]]


def _kind(serde: Serde) -> int:
    for kind, base in enumerate((TensorsToTensors, TensorsToBytes, BytesToBytes)):
        if isinstance(serde, base):
            return kind
    raise ConfigError(f"serde {serde!r} is none of the three kinds")


@lru_cache(maxsize=64)
def _from_spec(spec: tuple[Step, ...]) -> Pipeline:
    serdes: list[Serde] = []
    for name, options in spec:
        cls = component("serdes", name)
        complete = json.dumps({**cls.absent, **json.loads(options)})
        try:
            serdes.append(cls(cls.Options.model_validate_json(complete)))
        except ValidationError as error:  # another version's
            raise ConfigError(f"{name} {options}: {error.errors()[0]['msg']}") from error
    return Pipeline(serdes)
