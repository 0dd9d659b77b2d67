"""What the author of a plugin uses: the mark for hooks, the events, and what is counted of them.

    from lmcache_core.plugin import Event, Loaded, hookimpl

    @hookimpl
    def lmcache_event(event: Event) -> None:
        if isinstance(event, Loaded):
            print(f"{len(event.keys)} chunks from {event.tier} in {event.seconds:.3f} s")

The module, or an object of a class with such methods, is an entry point of the group
`lmcache_core.plugins`, or is handed to `lmcache_core.open(config, plugins=[...])`.
"""

from lmcache_core.plugins.events import (
    Bypassed,
    ChunkEvent,
    Damaged,
    Dropped,
    Event,
    Evicted,
    Failed,
    InUse,
    Loaded,
    LookedUp,
    Missed,
    PluginFailed,
    Reason,
    Removed,
    Stored,
)
from lmcache_core.plugins.hooks import hookimpl
from lmcache_core.plugins.metrics import METRICS, Metric, label_values

__all__ = [
    "METRICS",
    "Bypassed",
    "ChunkEvent",
    "Damaged",
    "Dropped",
    "Event",
    "Evicted",
    "Failed",
    "InUse",
    "Loaded",
    "LookedUp",
    "Metric",
    "Missed",
    "PluginFailed",
    "Reason",
    "Removed",
    "Stored",
    "hookimpl",
    "label_values",
]
