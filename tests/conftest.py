"""After every test: whatever it opened and started is gone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from lmcache_core.testing import no_leaks

settings.register_profile("any machine", deadline=None)  # examples may take as long as they like
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_leaks():
        yield
