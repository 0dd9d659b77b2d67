"""After every test: whatever it opened and started is gone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lmcache_core.testing import no_leaks
from lmcache_core.testing.processes import forked_early

# One thread for each process that computes: there are as many of them as cores, and threads of
# OpenMP that wait for one which has none waste the time of all.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
settings.register_profile("any machine", deadline=None)  # examples may take as long as they like
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Makes other processes."""
    return forked_early()


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_leaks():
        yield


@pytest.fixture
def open_tmp_path(tmp_path: Path) -> Path:
    """A directory that every user can get to."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.getuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o711)
    return tmp_path
