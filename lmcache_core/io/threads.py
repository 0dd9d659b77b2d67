"""Threads of ours: daemons, on cores that an engine may name.

An engine that computes on the CPU binds itself to its cores, and a thread inherits that from the
one that starts it: what is meant to run beside the computation would take turns with it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable

_cpus: frozenset[int] = frozenset()


def run_threads_on(cpus: Iterable[int]) -> None:
    """Where all threads that start from now on may run, in this process; none for where those may
    run that start them."""
    global _cpus
    _cpus = frozenset(cpus)


def start_thread(work: Callable[[], object], name: str) -> threading.Thread:
    """Run `work` on a new daemon thread."""

    def run() -> None:
        if _cpus:
            with contextlib.suppress(OSError):  # they were taken from this process since
                os.sched_setaffinity(0, _cpus)  # of this thread
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
