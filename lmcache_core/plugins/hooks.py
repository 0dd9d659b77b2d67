"""What plugins can hear and add."""

from __future__ import annotations

from typing import Any

import pluggy

from lmcache_core.plugins.events import Event

hookspec = pluggy.HookspecMarker("lmcache_core")
hookimpl = pluggy.HookimplMarker("lmcache_core")
"""Mark a plugin's functions with this."""


def call(implementation: pluggy.HookImpl, **arguments: object) -> Any:
    """Call one plugin's implementation of a hook, with those of the arguments that it takes."""
    return implementation.function(*[arguments[name] for name in implementation.argnames])


class Hooks:
    """The hooks. A plugin implements any of them, with any subset of the arguments."""

    @hookspec
    def lmcache_event(self, event: Event) -> None:
        """Something happened: one of the types in `lmcache_core.plugin`.

        Called on a thread of the plugin's own, soon after, one event after the other. What it
        raises is logged and counted (PluginFailed) and felt by nobody else.
        """

    @hookspec
    def lmcache_namespace(self, fields: dict[str, object]) -> dict[str, str]:  # type: ignore[empty-body]
        """Components to add to a new Namespace's `extra`; `fields` are its other fields.

        What it raises, or a result of another type, is a ConfigError: without its component, KV
        would be shared across what the plugin keeps apart.
        """
