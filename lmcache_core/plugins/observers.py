"""Observers: who hears of an engine's events: its counters, and plugins, each by itself."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import partial

import pluggy

from lmcache_core.errors import ConfigError
from lmcache_core.plugins import registry
from lmcache_core.plugins.blame import cause, culprit
from lmcache_core.plugins.counters import Counters
from lmcache_core.plugins.events import Event, PluginFailed
from lmcache_core.plugins.hooks import Hooks, call
from lmcache_core.plugins.listener import Listener
from lmcache_core.plugins.log import log


class Observers:
    """The counters of one engine, installed plugins and those handed in."""

    def __init__(self, plugins: Sequence[object] = ()) -> None:
        """Raises ConfigError, which names the plugin that cannot be used."""
        self.counters = Counters()
        self._listeners: list[Listener] = []
        self._namers: list[tuple[str, pluggy.HookImpl]] = []
        try:
            for name, plugin in (*_installed(), *_handed_in(plugins)):
                self._register(name, plugin)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Observers({', '.join(each.plugin for each in self._listeners)})"

    def tell(self, event: Event) -> None:
        """Count an event and have plugins hear it. Takes no lock, so that a finalizer may call."""
        self.counters.add(event)
        for listener in self._listeners:
            listener.tell(event)

    def add_to_namespace(self, extra: dict[str, str], fields: dict[str, object]) -> None:
        """Add to `extra` what plugins have for a Namespace of these fields. Raises ConfigError
        where one fails, or has what is there already: without its part, KV would be shared across
        what the plugin keeps apart."""
        for name, implementation in self._namers:
            try:
                more = call(implementation, fields=dict(fields))
                _check_parts(more, extra)
            except BaseException as error:  # also what would end the process
                log.debug("plugin %s: %s", name, culprit(error, implementation.function))
                text = f"plugin {name}: failed in lmcache_namespace: {cause(error)}"
                raise ConfigError(text) from error
            extra |= more

    def close(self) -> None:
        """Wait a little until plugins have heard all."""
        for listener in self._listeners:
            listener.close()

    def _register(self, name: str, plugin: object) -> None:
        try:
            for caller in _hooks_of(name, plugin):
                for implementation in caller.get_hookimpls():
                    if caller.name == "lmcache_namespace":
                        self._namers.append((name, implementation))
                    else:
                        told = partial(self._plugin_failed, len(self._listeners))
                        self._listeners.append(Listener(name, implementation, told))
        except BaseException as error:
            raise ConfigError(f"plugin {name} cannot be used: {cause(error)}") from error

    def _plugin_failed(self, number: int, event: PluginFailed) -> None:
        """All are told but the one that failed: it would fail again."""
        self.counters.add(event)
        for listener in (*self._listeners[:number], *self._listeners[number + 1 :]):
            listener.tell(event)


def _installed() -> Iterator[tuple[str, object]]:
    for name in registry.known("plugins"):
        yield registry.described("plugins", name), registry.component("plugins", name)


def _handed_in(plugins: Sequence[object]) -> Iterator[tuple[str, object]]:
    for plugin in plugins:
        kind = type(plugin)
        yield f"{kind.__module__}.{kind.__qualname__}", plugin


def _hooks_of(name: str, plugin: object) -> Iterator[pluggy.HookCaller]:
    """The hooks that a plugin implements. Raises what pluggy does for wrong arguments, and
    TypeError for a name that must be a misspelling; others may be of another version."""
    manager = pluggy.PluginManager("lmcache_core")  # for this plugin alone: who fails is known
    manager.add_hookspecs(Hooks)
    manager.register(plugin)
    names = [hook for hook in vars(Hooks) if hook.startswith("lmcache_")]
    for caller in manager.get_hookcallers(plugin) or ():
        close = difflib.get_close_matches(caller.name, names, 1, cutoff=0.85)
        if any(each.wrapper or each.hookwrapper for each in caller.get_hookimpls()):
            raise TypeError(f"{caller.name}: each plugin is called by itself, none wraps others")
        if caller.has_spec():
            yield caller
        elif close:
            raise TypeError(f"unknown hook {caller.name}, did you mean {close[0]}?")
        else:
            log.warning(
                "plugin %s: unknown hook %s; known: %s", name, caller.name, ", ".join(names)
            )


def _check_parts(more: object, extra: dict[str, str]) -> None:
    if not isinstance(more, dict) or not all(isinstance(t, str) for kv in more.items() for t in kv):
        raise TypeError(f"expected a dict of str to str; got {more!r}")
    if twice := sorted(more.keys() & extra.keys()):
        raise ValueError(f"{', '.join(twice)}: is there already")
