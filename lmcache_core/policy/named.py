"""Policies by name, as a config gives them."""

from __future__ import annotations

from typing import Any, Literal

from lmcache_core.plugins.registry import component
from lmcache_core.policy.eviction import EvictionPolicy
from lmcache_core.policy.shares import Shares

Tenants = Literal["shared", "equal"]
"""How tenants divide a store: not at all, or each has a right to an equal part."""


def eviction_policy(name: str, capacity: int, tenants: Tenants = "shared") -> EvictionPolicy[Any]:
    """The policy `name` for a store of `capacity` bytes. Raises UnknownComponent, with the closest
    name, for one that no installed package brings."""
    make = component("eviction", name)
    policy: EvictionPolicy[Any] = Shares(capacity, make) if tenants == "equal" else make(capacity)
    return policy
