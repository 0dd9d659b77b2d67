"""Pipeline: the steps from a chunk's tensors to a frame's payload, and back."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from lmcache_core.errors import ConfigError, FrameError
from lmcache_core.frames.format import Header, Step
from lmcache_core.frames.limits import MAX_STEPS
from lmcache_core.io.buffers import Buffers
from lmcache_core.io.device import to_host
from lmcache_core.io.memory import HOST
from lmcache_core.kv.layout import Tensors
from lmcache_core.plugins.blame import cause
from lmcache_core.plugins.registry import component, reloaded
from lmcache_core.serde import BytesToBytes, ChunkInfo, Serde, TensorsToBytes, TensorsToTensors

_MAX_READERS = 64
"""Other pipelines that frames recorded, kept for the next frame."""


class Pipeline:
    """Tensors-to-tensors steps, exactly one tensors-to-bytes step, bytes-to-bytes steps.

    A missing middle is `raw`. A step that seals is the last. Raises ConfigError for an impossible
    order.
    """

    def __init__(self, serdes: Sequence[Serde]) -> None:
        self.serdes = _complete(serdes)
        self.middle = next(s for s in self.serdes if isinstance(s, TensorsToBytes))
        self.before = [s for s in self.serdes if isinstance(s, TensorsToTensors)]
        self.after = [s for s in self.serdes if isinstance(s, BytesToBytes)]
        self.steps: tuple[Step, ...] = tuple(
            # What is as by default is not said: an older version that lacks the option reads it.
            (s.name, s.frame_options().model_dump_json(exclude_defaults=True))
            for s in self.serdes
        )
        """What frames record."""
        self._readers: dict[tuple[Step, ...], Pipeline] = {self.steps: self}

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(serde.name for serde in self.serdes)})"

    # Writing

    def to_tensors(self, tensors: Tensors, info: ChunkInfo) -> Tensors:
        """Run the tensors-to-tensors steps, then bring the result to the host, contiguous."""
        for serde in self.before:
            tensors = serde.encode(_lent(tensors, serde), info)
        return {name: to_host(tensor) for name, tensor in tensors.items()}

    def to_payload(self, tensors: Tensors, context: bytes) -> list[memoryview]:
        """The payload of host tensors, as buffers that follow each other."""
        parts = self.middle.encode(_lent(tensors, self.middle))
        for serde in self.after:
            parts = serde.encode([part.toreadonly() for part in parts], context)
        return parts

    # Reading

    def reading(self, header: Header) -> Pipeline:
        """The pipeline that a frame records, made of this one's own serdes where it has them.

        Raises FrameError, "unreadable", for what is not installed here or not configured, and for
        a frame without the seal that this pipeline has.
        """
        reader = self._readers.get(header.steps)
        if reader is None:
            self._check_seal(header.steps)
            reader = self._reader(header.steps)
            if len(self._readers) > _MAX_READERS:
                self._readers = {self.steps: self}
            self._readers[header.steps] = reader
        if not reader.before and not header.plain:
            raise FrameError("its tensors are not those of its layout")
        return reader

    def _check_seal(self, steps: Sequence[Step]) -> None:
        last = self.serdes[-1]
        if isinstance(last, BytesToBytes) and last.seals and steps[-1][0] != last.name:
            raise FrameError(f"not sealed by {last.name}, as all of this tier are", "unreadable")

    def _reader(self, steps: Sequence[Step]) -> Pipeline:
        own = {serde.name: serde for serde in self.serdes}
        try:
            serdes = [_recorded(own.get(name), name, options) for name, options in steps]
            return Pipeline(serdes)
        except (KeyboardInterrupt, FrameError):
            raise
        except BaseException as error:  # a plugin's import may raise anything
            names = ", ".join(name for name, _ in steps)
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else cause(error)
            raise FrameError(f"[{names}] is not read here: {why}", "unreadable") from error

    def decode(self, payload: Buffers, header: Header, info: ChunkInfo, context: bytes) -> Tensors:
        """The chunk's tensors. Raises FrameError for a payload that this pipeline did not make."""
        try:
            for last in reversed(self.after):
                readonly = [part.toreadonly() for part in payload]
                payload = last.decode(readonly, context, _Room(header.limit), header.limit)
                if sum(part.nbytes for part in payload) > header.limit:
                    raise ValueError(f"{last.name}: more than {header.limit} bytes")
            tensors = self.middle.decode(payload, header.specs)
            for first in reversed(self.before):
                tensors = first.decode(_lent(tensors, first), info)
            info.layout.check(tensors, info.tokens)
        except (KeyboardInterrupt, FrameError):
            raise
        except BaseException as error:  # a payload may be anything, and so may what a serde raises
            kind = type(error).__name__
            raise FrameError(f"payload does not decode: {kind}: {cause(error)}") from error
        return tensors


class _Room:
    """Memory of the pool for what a step makes, up to `limit` bytes in all."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def __call__(self, nbytes: int) -> memoryview:
        self._left -= nbytes
        if nbytes < 0 or self._left < 0:
            raise ValueError(f"asks for {nbytes} bytes, {-self._left} more than can be")
        return HOST.allocate(nbytes)


def _lent(tensors: Tensors, serde: TensorsToTensors | TensorsToBytes) -> Tensors:
    """Tensors for a serde, which may be those that a memory tier holds: copies, unless it says that
    it leaves them alone."""
    return tensors if serde.keeps_input else {name: t.clone() for name, t in tensors.items()}


def _recorded(own: Serde | None, name: str, options: str) -> Serde:
    """The serde of a frame's step: this tier's own, or one without any configuration."""
    if own is None:
        cls = component("serdes", name)
        own = cls(cls.Options())
    return own.for_frame(own.Recorded.model_validate_json(options))


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
    if any(isinstance(serde, BytesToBytes) and serde.seals for serde in serdes[:-1]):
        raise ConfigError(f"impossible serde order [{names}]: a step that seals is the last")
    if 1 not in kinds:
        raw = component("serdes", "raw")
        serdes = sorted([*serdes, raw(raw.Options())], key=_kind)  # each kind keeps its order
    if len(serdes) > MAX_STEPS:
        raise ConfigError(f"{len(serdes)} serdes [{names}]; at most {MAX_STEPS}")
    return list(serdes)


def _kind(serde: Serde) -> int:
    for kind, base in enumerate((TensorsToTensors, TensorsToBytes, BytesToBytes)):
        if isinstance(serde, base):
            return kind
    fault = reloaded(type(serde), Serde) or "is none of the three kinds"
    raise ConfigError(f"serde {serde.name!r} {fault}")
