"""Notices that a running worker gets other weights: KV of the old ones fits them no more.

vLLM changes weights through few methods of its worker; `watch` wraps them. Whoever writes to the
parameters in another way has to call `LLM.reset_prefix_cache(reset_connector=True)`, as for
vLLM's own prefix cache.

Adapters that a server loads before any request names them come through one method of the engine's
core; `watch_adapters` tells the connector there.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

_METHODS = ("reload_weights", "update_weights", "start_weight_update", "finish_weight_update")
_counter = itertools.count(1)
_changes = 0


def changes() -> int:
    """How often this process's workers were given other weights."""
    return _changes


def watch() -> None:
    """Count from now on. May be called more than once."""
    from vllm.v1.worker.gpu_worker import Worker

    for name in _METHODS:
        method = getattr(Worker, name, None)
        if method is not None and not hasattr(method, "lmcache_core"):
            setattr(Worker, name, _counted(method))


def _counted(method: Any) -> Any:
    @functools.wraps(method)
    def counted(*args: Any, **kwargs: Any) -> Any:
        global _changes
        _changes = next(_counter)
        return method(*args, **kwargs)

    counted.lmcache_core = True  # type: ignore[attr-defined]
    return counted


def watch_adapters() -> None:
    """In the engine core's process. May be called more than once."""
    from vllm.v1.engine.core import EngineCore

    if not hasattr(EngineCore.add_lora, "lmcache_core"):
        EngineCore.add_lora = _told(EngineCore.add_lora)


def _told(method: Any) -> Any:
    @functools.wraps(method)
    def told(self: Any, lora_request: Any) -> Any:
        connector = self.scheduler.get_kv_connector()
        for each in getattr(connector, "_connectors", [connector]):  # several in one
            if hasattr(each, "on_adapter"):
                each.on_adapter(lora_request)
        return method(self, lora_request)

    told.lmcache_core = True  # type: ignore[attr-defined]
    return told
