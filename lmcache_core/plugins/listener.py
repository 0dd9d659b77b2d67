"""Listener: one plugin's ear. Whatever the plugin does in it, the engine and others do not feel."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress

import pluggy

from lmcache_core.io.threads import start_thread
from lmcache_core.plugins.blame import cause, culprit
from lmcache_core.plugins.events import Event, PluginFailed
from lmcache_core.plugins.hooks import call
from lmcache_core.plugins.log import LOG, log

LIMIT = 4096
"""Events that wait for a plugin; what comes while so many wait, it does not hear."""
CLOSE_SECONDS = 1.0
"""How long `close` waits until the plugin has heard all."""


class Listener:
    """Tells one plugin of events, on a thread of its own.

    So a plugin may be slow, hang, or raise what ends a thread or a process, and an event may be
    told by a finalizer, in the middle of anything: a SimpleQueue takes it without a lock.
    """

    def __init__(
        self, plugin: str, hook: pluggy.HookImpl, failed: Callable[[PluginFailed], None]
    ) -> None:
        """`plugin`: its name and distribution. `hook`: its lmcache_event. `failed` hears of each
        failure. Where no thread can be had, the plugin hears nothing."""
        self.plugin = plugin
        self._hook, self._failed = hook, failed
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        try:
            self._thread = start_thread(self._run, "lmcache-plugin")
        except RuntimeError as error:
            self._trouble(cause(error))

    def __repr__(self) -> str:
        return f"Listener({self.plugin}, {self._events.qsize()} events wait)"

    def tell(self, event: Event) -> None:
        """Have the plugin hear an event, soon."""
        if self._thread is None:
            return
        if self._events.qsize() < LIMIT:
            self._events.put(event)
        elif not isinstance(event, PluginFailed):
            self._trouble(f"{LIMIT} events wait for it; it is too slow for more")

    def close(self) -> None:
        """Wait a little until the plugin has heard all; one that hangs is left behind."""
        self._events.put(None)
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                call(self._hook, event=event)
            except BaseException as error:  # SystemExit and the like are the plugin's own, here
                with suppress(BaseException):
                    log.debug("plugin %s: %s", self.plugin, culprit(error, self._hook.function))
                    self._trouble(cause(error))

    def _trouble(self, text: str) -> None:
        LOG.warn(f"plugin {self.plugin}", f"plugin {self.plugin}: failed in lmcache_event: {text}")
        self._failed(PluginFailed(plugin=self.plugin, cause=text))
