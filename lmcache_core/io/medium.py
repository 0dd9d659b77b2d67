"""Media: how many bytes this host's memory and its file systems have, used or not."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's limit stands, in the two versions of control groups."""


def memory_bytes() -> int:
    """Of this host, or of the container that this process is in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _CGROUPS:
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(limits)


def file_system_bytes(path: str | Path) -> int:
    """Of the file system that `path`, which need not be there yet, is on. Raises OSError."""
    here = os.path.abspath(path)
    while not os.path.exists(here):
        here = os.path.dirname(here)
    found = os.statvfs(here)
    return found.f_frsize * found.f_blocks
