"""What tests of several backends share."""

from __future__ import annotations

import pytest

from lmcache_backends import _memcached_servers, memcached, redis, s3
from tests.backends.frames import LONG


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening waits for what the server says of a wrong configuration, however busy this machine
    is; without it, a server that takes longer than a second counts as one that is down."""
    for module, name in (
        (memcached, "OPEN_SECONDS"),
        (_memcached_servers, "OPEN_SECONDS"),
        (redis, "_OPEN_SECONDS"),
        (s3, "_OPEN_SECONDS"),
    ):
        monkeypatch.setattr(module, name, LONG)
