"""Other processes for tests, which do not begin by importing torch for seconds."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext


def forked_early() -> ForkServerContext:
    """Makes processes that are forks of one that has imported torch and done nothing else.

    That one is started here, once, and stays: whoever counts open files does so afterwards.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lmcache_core.testing"])
    forkserver.ensure_running()
    return context
