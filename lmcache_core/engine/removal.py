"""Removal: taking chunks out of every tier, by key or by what their namespace says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lmcache_core.engine.tier import Tier
from lmcache_core.kv.keys import ChunkKey
from lmcache_core.kv.namespace import Namespace, tenant_digest
from lmcache_core.plugins import blame

BATCH = 1024
"""Keys to remove at a time."""


@dataclass(frozen=True)
class Removal:
    """What was removed, and where that failed."""

    chunks: dict[str, int] = field(default_factory=dict)
    """Chunks that were there and are gone, by tier."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why a tier may still have some."""

    @property
    def complete(self) -> bool:
        """Whether no tier has any left."""
        return not self.failed


@dataclass(frozen=True)
class Selection:
    """Namespaces: one, those of a model's name, of a tenant, of both; all where nothing is said,
    those that cannot be read included."""

    namespace: Namespace | None = None
    model: str | None = None
    tenant: str | None = None

    def takes(self, named: Namespace | None) -> bool:
        """Whether a namespace is meant; None is one that cannot be read."""
        if self == Selection():
            return True
        return named is not None and (
            (self.namespace is None or named.digest == self.namespace.digest)
            and (self.model is None or named.model == self.model)
            and (self.tenant is None or named.tenant == tenant_digest(self.tenant))
        )


def remove(tiers: Sequence[Tier], keys: Sequence[ChunkKey], seconds: float | None) -> Removal:
    """Take chunks out of all tiers."""
    return _everywhere(tiers, lambda tier: tier.take_out(keys, seconds))


def clear(tiers: Sequence[Tier], selection: Selection, seconds: float) -> Removal:
    """Take out all chunks of some namespaces."""
    return _everywhere(tiers, lambda tier: _clear(tier, selection, seconds))


def _everywhere(tiers: Sequence[Tier], work: Callable[[Tier], int]) -> Removal:
    removal = Removal()
    for tier in tiers:
        try:
            removal.chunks[tier.name] = work(tier)
        except Exception as error:
            removal.failed[tier.name] = blame.cause(error)
    return removal


def _clear(tier: Tier, selection: Selection, seconds: float) -> int:
    verdicts: dict[bytes, bool] = {}

    def goes(key: ChunkKey) -> bool:
        if key.namespace not in verdicts:
            verdicts[key.namespace] = selection.takes(tier.namespace_of(key))
        return verdicts[key.namespace]

    keys = filter(goes, (each.key for each in tier.scan(seconds)))
    return sum(tier.take_out(some, seconds) for some in _batches(keys))


def _batches(keys: Iterable[ChunkKey]) -> Iterator[list[ChunkKey]]:
    rest = iter(keys)
    while some := list(itertools.islice(rest, BATCH)):
        yield some
