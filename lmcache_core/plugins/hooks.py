"""What plugins can hear and add. A plugin that raises is logged, not felt."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from lmcache_core.kv.keys import ChunkKey

hookspec = pluggy.HookspecMarker("lmcache_core")
hookimpl = pluggy.HookimplMarker("lmcache_core")
"""Mark a plugin's functions with this."""


class Hooks:
    """The hooks. A plugin implements any of them, with any subset of the arguments."""

    @hookspec
    def lmcache_stored(self, tier: str, keys: Sequence[ChunkKey], nbytes: int) -> None:
        """`tier` now has these chunks; `nbytes` of KV."""

    @hookspec
    def lmcache_loaded(self, tier: str, keys: Sequence[ChunkKey], nbytes: int) -> None:
        """These chunks came from `tier`; `nbytes` of KV."""

    @hookspec
    def lmcache_missed(self, tier: str, reason: str, keys: Sequence[ChunkKey]) -> None:
        """`reason`: absent, hole (there, but what comes before is not), evicted (gone since the
        lookup), damaged, foreign (another key's frame), unreadable (another version, or a serde
        that is not installed), deadline, error or open (bypassed).

        `tier` is "" for absent and hole: they are of no one tier."""

    @hookspec
    def lmcache_dropped(self, tier: str, reason: str, keys: Sequence[ChunkKey]) -> None:
        """`tier` did not store these. `reason`: full, queue, hole, deadline, error or open."""

    @hookspec
    def lmcache_evicted(self, tier: str, keys: Sequence[ChunkKey]) -> None:
        """`tier` removed these to make room."""

    @hookspec
    def lmcache_tier_state(self, tier: str, path: str, state: str, cause: str) -> None:
        """`tier`'s `path` ("reads" or "writes") is now "open" (bypassed, because of `cause`) or
        "closed" (in use)."""

    @hookspec
    def lmcache_namespace(self, fields: dict[str, object]) -> dict[str, str]:  # type: ignore[empty-body]
        """Components to add to a new Namespace's `extra`; `fields` are its other fields."""
