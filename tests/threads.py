"""A process that is short of threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def no_more_threads() -> Iterator[None]:
    """No thread can be started, as where the system's limit is reached."""
    error = RuntimeError("can't start new thread")
    with mock.patch.object(threading.Thread, "start", side_effect=error):
        yield
