"""What tests of several backends share."""

from __future__ import annotations

import pytest

from lmcache_backends.memcached import backend as memcached
from lmcache_backends.memcached import servers as _memcached_servers
from lmcache_backends.redis import backend as redis
from lmcache_backends.s3 import backend as s3
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
