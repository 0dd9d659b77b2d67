"""Connector: an inference engine's side of the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lmcache_core.kv.layout import Tensors
from lmcache_core.kv.namespace import Namespace


class Connector(ABC):
    """Moves chunks of one sequence between an engine's KV memory and the CacheEngine.

    for chunk in cache.load(keys):
        connector.scatter(chunk.index, chunk.tensors)
    ... prefill the rest ...
    cache.store(connector.namespace, keys, connector.gather, start=loaded)
    """

    @property
    @abstractmethod
    def namespace(self) -> Namespace:
        """What the engine's KV belongs to."""

    @abstractmethod
    def gather(self, index: int, out: Tensors) -> None:
        """Copy chunk `index` out of the engine's memory into `out` (host tensors of the layout)."""

    @abstractmethod
    def scatter(self, index: int, tensors: Tensors) -> None:
        """Copy chunk `index` into the engine's memory. `tensors` are shared: never keep or
        change them."""
