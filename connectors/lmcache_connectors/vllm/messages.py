"""What the scheduler's side and the workers tell each other in a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmcache_connectors.vllm.chunks import Chunks


@dataclass
class Metadata(KVConnectorMetadata):
    """What the scheduler tells the workers in one step."""

    loads: list[Chunks] = field(default_factory=list)
    stores: list[Chunks] = field(default_factory=list)
    weights: str = ""
    """What the workers compute with; "" where that is not known, and nothing is moved."""
    idle: bool = False
    """Whether vLLM computes nothing in this step."""
    number: int = 0
    """The step's."""


@dataclass
class Report(KVConnectorWorkerMetadata):
    """What a worker tells the scheduler in one step."""

    step: int = 0
    """Its number."""
    adapters: set[int] = field(default_factory=set)
    """Numbers of LoRA adapters that are not what the scheduler thought."""
    loads: list[tuple[int, int, float]] = field(default_factory=list)
    """Loads that ended, told by the first rank for all: their slowest tier, the tokens that came,
    seconds."""
    off: bool = False
    """It moves nothing."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        if not isinstance(other, Report):
            return self
        return Report(
            self.step,
            self.adapters | other.adapters,
            self.loads + other.loads,
            self.off or other.off,
        )
