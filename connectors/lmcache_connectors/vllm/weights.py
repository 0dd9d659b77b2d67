"""What vLLM's workers compute with, as its engine core knows it: asked at start, and again after
whatever may have changed it.

vLLM and its users change weights and adapters through the engine core: by a method of the workers
that they call there (`reload_weights`, `update_weights`, one of their own), by waking it up, by
loading an adapter. `watch` notes all such calls, whatever they do; the workers are asked again
before the next use, and answer with the content of what they hold. What was the same is the same.
Whoever writes to the parameters past the engine core calls `reset_prefix_cache(
reset_connector=True)`, as for vLLM's own cache.
"""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from lmcache_connectors.vllm import held
from lmcache_connectors.vllm.chunks import Adapter
from lmcache_core import ConfigError
from lmcache_core.backend import LOG
from lmcache_core.connector import combined_digest
from lmcache_core.errors import NoContent

log = logging.getLogger("vllm.lmcache_core")

_CALLS = ("collective_rpc", "wake_up", "add_lora", "remove_lora")
"""Methods of the engine core through which what the workers hold is changed."""
_core: weakref.ref[Any] | None = None
"""The engine core of this process that was built last."""


def watch() -> None:
    """Note from now on what may change the workers. May be called more than once."""
    from vllm.v1.engine.core import EngineCore

    if hasattr(EngineCore, "lmcache_core"):
        return
    EngineCore.lmcache_core = 0  # how often something may have changed
    EngineCore._initialize_kv_caches = _remembered(EngineCore._initialize_kv_caches)
    for name in _CALLS:
        setattr(EngineCore, name, _counted(getattr(EngineCore, name)))


def _remembered(method: Any) -> Any:
    """The last thing that a core does before it builds the connector, which wants to know it."""

    @functools.wraps(method)
    def remembered(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _core
        _core = weakref.ref(self)
        return method(self, *args, **kwargs)

    return remembered


def _counted(method: Any) -> Any:
    @functools.wraps(method)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.lmcache_core += 1
        return method(self, *args, **kwargs)

    return counted


class Workers:
    """The workers of the engine core that is being built. For the thread that schedules."""

    def __init__(self) -> None:
        """Raises ConfigError where vLLM did not load our plugin."""
        core: Any = _core and _core()
        if core is None:
            raise ConfigError(
                "vLLM did not load the plugin lmcache_core; does VLLM_PLUGINS name it?"
            )
        self._core: Any = weakref.proxy(core)
        self._seen = -1
        self._weights = ""
        self._adapters: OrderedDict[int, Adapter] = OrderedDict()
        """Those asked about last, as many as vLLM keeps: what it has dropped it loads anew."""
        lora = core.vllm_config.lora_config
        self._kept = (lora.max_cpu_loras or lora.max_loras) if lora else 0

    def weights(self) -> str:
        """Stands for everything that all of them hold; "" while nobody can tell."""
        self._look()
        return self._weights

    def adapter(self, lora: Any) -> Adapter | None:
        """A LoRA adapter as they have loaded it, which they do now if they have not; None where it
        cannot be."""
        self._look()
        number = lora.lora_int_id
        known = self._adapters.pop(number, None)
        if known is None or lora.load_inplace:
            try:
                found = self._ask(adapter_of, lora)
            except Exception as error:  # vLLM says so to who asked for it
                LOG.warn("vLLM adapter", f"vLLM: an adapter is not shared: {error!r}")
                return None
            whole = combined_digest(_by_rank([{"": each} for each in found]))
            known = Adapter(number, whole.hex(), tuple(each.hex() for each in found))
        self._adapters[number] = known
        while len(self._adapters) > self._kept:
            self._adapters.popitem(last=False)
        return known

    def forget_adapters(self, numbers: Iterable[int]) -> None:
        """Ask about them again before their next use."""
        for number in numbers:
            self._adapters.pop(number, None)

    def forget(self) -> None:
        """Ask again before the next use."""
        self._seen = -1

    def _look(self) -> None:
        if self._seen == self._core.lmcache_core or self._core.model_executor.is_sleeping:
            return
        self._seen = self._core.lmcache_core
        self._adapters.clear()
        self._weights = ""
        began = time.perf_counter()
        try:
            found = self._ask(weights_of)
        except Exception as error:  # a worker's; vLLM goes on, or ends for its own reasons
            found = [repr(error)]
        if why := [each for each in found if isinstance(each, str)]:
            LOG.warn("vLLM weights", f"lmcache-core rests, nobody can tell the weights: {why[0]}")
            return
        self._weights = combined_digest(_by_rank([digests for digests, _ in found])).hex()
        seconds = time.perf_counter() - began
        log.info(
            "lmcache-core has read the weights of %d workers in %.3f s: %.3f GB, %s",
            len(found), seconds, sum(n for _, n in found) / 1e9, self._weights,
        )  # fmt: skip

    def _ask(self, question: Any, *arguments: Any) -> list[Any]:
        """What every worker answers, by rank. It is asked between steps."""
        answers: list[Any] = self._core.model_executor.collective_rpc(question, args=arguments)
        return answers


def _by_rank(found: list[dict[str, bytes]]) -> dict[str, bytes]:
    return {
        f"{rank} {name}": each for rank, some in enumerate(found) for name, each in some.items()
    }


# In a worker

_worker: weakref.ref[Any] | None = None
"""This process's, once it was asked."""
_read: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()
"""Adapters as loaded, each read once; to load one anew makes another."""


def weights_of(worker: Any) -> tuple[dict[str, bytes], int] | str:
    """Everything that a worker's models hold, by name, and their bytes; or why nobody can tell."""
    global _worker
    _worker = weakref.ref(worker)
    draft = getattr(worker, "get_draft_model", lambda: None)()
    try:
        return held.digests(model for model in (worker.get_model(), draft) if model is not None)
    except NoContent as error:
        return str(error)


def adapter_of(worker: Any, lora: Any) -> bytes:
    """An adapter as this worker has loaded it. Raises what vLLM raises where it cannot be."""
    worker.add_lora(lora)
    found = _loaded(worker, lora.lora_int_id)
    if found is None:
        raise LookupError(f"adapter {lora.lora_name} is not there after it was loaded")
    return found


def adapter_here(number: int) -> str:
    """What this process's worker has loaded as adapter `number`; "" for nothing."""
    worker = _worker and _worker()
    return (_loaded(worker, number) or b"").hex() if worker else ""


def _loaded(worker: Any, number: int) -> bytes | None:
    adapters = worker.model_runner.lora_manager._adapter_manager.list_adapters()
    adapter = adapters.get(number)
    if adapter is None:
        return None
    if adapter not in _read:
        _read[adapter] = combined_digest(held.adapter_digests(adapter))
    return _read[adapter]
