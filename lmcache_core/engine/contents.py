"""Contents: what lies in each tier, by namespace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmcache_core.engine.tier import Tier
from lmcache_core.kv.namespace import Namespace
from lmcache_core.plugins import blame


@dataclass
class Content:
    """The chunks of one namespace in one tier."""

    tier: str
    digest: bytes
    """The namespace's, 16 bytes."""
    namespace: Namespace | None
    """None where no chunk of it can be read here."""
    chunks: int = 0
    nbytes: int = 0
    """As they lie in the store."""


@dataclass
class Contents:
    """What was found, and which tiers could not tell."""

    found: list[Content]
    failed: dict[str, str]
    """Why, by tier."""


def contents(tiers: Sequence[Tier], seconds: float) -> Contents:
    """What all tiers hold; each may take so many seconds to tell."""
    all_of_them = Contents([], {})
    for tier in tiers:
        try:
            all_of_them.found += _of(tier, seconds)
        except Exception as error:
            all_of_them.failed[tier.name] = blame.cause(error)
    return all_of_them


def _of(tier: Tier, seconds: float) -> list[Content]:
    found: dict[bytes, Content] = {}
    for key, nbytes in tier.scan(seconds):
        content = found.get(key.namespace)
        if content is None or content.namespace is None:
            namespace = tier.namespace_of(key)
            content = found.setdefault(key.namespace, Content(tier.name, key.namespace, namespace))
            content.namespace = namespace
        content.chunks += 1
        content.nbytes += nbytes
    return sorted(found.values(), key=lambda each: -each.nbytes)
