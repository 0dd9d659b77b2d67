"""The soak in short: some seconds of what `make soak` does for as long as a million loads take."""

from __future__ import annotations

from multiprocessing.context import ForkServerContext

import pytest

from tests.soak.soak import soak
from tests.soak.worker import Count


@pytest.mark.soak
def test_nothing_is_wrong_or_raised_whatever_happens(processes: ForkServerContext) -> None:
    report = soak(4, 1 << 60, seed=1, names=["shm, redis"])
    print(f"\n{report.table()}")
    assert not report.trouble
    assert report.total(Count.LOADS) > 100
