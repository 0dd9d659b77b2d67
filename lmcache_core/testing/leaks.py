"""A check that what a test opened is closed when it ends."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker

GRACE_SECONDS = 5.0
_ARENAS = ("/dev/shm/pym-", "/tmp/pym-")


@contextlib.contextmanager
def no_leaks() -> Iterator[None]:
    """Fail if more threads or open files are there afterwards than before."""
    resource_tracker.ensure_running()  # the first spawn starts it, and it stays
    before = _threads(), _files()
    yield
    end = time.monotonic() + GRACE_SECONDS
    while (left := _more(before)) and time.monotonic() < end:
        gc.collect()
        time.sleep(0.02)
    if left:
        raise AssertionError(f"left behind: {', '.join(sorted(left))}")


def _more(before: tuple[set[str], dict[str, str]]) -> set[str]:
    threads, files = before
    opened = {f"fd {fd} ({path})" for fd, path in _files().items() if files.get(fd) != path}
    return (_threads() - threads) | opened


def _threads() -> set[str]:
    return {f"thread {thread.name} {thread.ident}" for thread in threading.enumerate()}


def _files() -> dict[str, str]:
    """Open files by descriptor, where the system tells."""
    files: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError):
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                files[fd] = os.readlink(f"/proc/self/fd/{fd}")
    # multiprocessing keeps the arena of its first shared value.
    return {fd: path for fd, path in files.items() if not path.startswith(("/proc/", *_ARENAS))}
