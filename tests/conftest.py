"""After every test: whatever it opened and started is gone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmcache_core.testing import no_leaks


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    with no_leaks():
        yield
