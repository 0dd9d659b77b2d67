"""The log: one line for each kind of trouble, once in a while."""

from __future__ import annotations

import logging
import threading
import time

from lmcache_core.io import process
from lmcache_core.plugins.secrets import masked


class _Masking(logging.Filter):
    """Hides what may be a secret in whatever is logged here."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = masked(record.getMessage()), ()
        return True


log = logging.getLogger("lmcache_core")
log.addFilter(_Masking("lmcache_core"))
QUIET_SECONDS = 60.0
"""One line for each kind of trouble in this time."""


class RateLimitedLog:
    """Warnings, at most one of a kind each QUIET_SECONDS, with a count of those left out."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, int]] = {}
        self._lock = process.freed_in_children(threading.RLock())

    def warn(self, kind: str, message: str) -> None:
        """Log `message` unless one of the same `kind` was logged just now."""
        now = time.monotonic()
        with self._lock:
            last, left_out = self._seen.get(kind, (-QUIET_SECONDS, 0))
            quiet = now - last < QUIET_SECONDS
            self._seen[kind] = (last, left_out + 1) if quiet else (now, 0)
        if not quiet:
            log.warning("%s%s", message, f" ({left_out} more like it)" if left_out else "")


LOG = RateLimitedLog()
"""For what goes wrong again and again at run time, in plugins as well."""
