"""Plugins at work: loading them, calling them safely, and the counters that every engine has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pluggy

from lmcache_core.errors import ConfigError
from lmcache_core.plugins.counters import Counters
from lmcache_core.plugins.hooks import Hooks
from lmcache_core.plugins.log import LOG


class Observers:
    """The hooks of one engine: its counters, installed plugins and those handed in."""

    def __init__(self, plugins: Sequence[object] = ()) -> None:
        self.counters = Counters()
        self._manager = pluggy.PluginManager("lmcache_core")
        self._manager.add_hookspecs(Hooks)
        try:
            self._manager.load_setuptools_entrypoints("lmcache_core.plugins")
            for plugin in (self.counters, *plugins):
                self._manager.register(plugin)
        except Exception as error:  # a plugin's import may raise anything
            raise ConfigError(f"a plugin cannot be loaded: {error}") from error

    @classmethod
    def silent(cls) -> Observers:
        """Observers that hear nothing."""
        observers = cls.__new__(cls)
        observers.counters = Counters()
        observers._manager = pluggy.PluginManager("lmcache_core")
        observers._manager.add_hookspecs(Hooks)
        return observers

    def tell(self, hook: str, **arguments: Any) -> list[Any]:
        """Call `hook`; what a plugin raises is logged once in a while."""
        try:
            return list(getattr(self._manager.hook, f"lmcache_{hook}")(**arguments))
        except Exception as error:  # a plugin must not break the engine
            LOG.warn(f"plugin {hook}", f"a plugin failed in lmcache_{hook}: {error!r}")
            return []
