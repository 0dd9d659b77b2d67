"""Notices that a running worker gets other weights: KV of the old ones fits them no more.

vLLM changes weights through few methods of its worker; `watch` wraps them. Whoever writes to the
parameters in another way has to call `LLM.reset_prefix_cache(reset_connector=True)`, as for
vLLM's own prefix cache.
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
