"""Encoding and decoding take less than two more chunks of memory and a MiB, results included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the high-water mark")
def test_less_than_two_chunks() -> None:
    # The allocator gives back at once what is freed, or it would be used again and not count.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.serde.measure_memory"],
        cwd=Path(__file__).parents[2],
        env=env,
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["zstd / bfloat16"][1] > 0.9  # it does see memory
    mib = 1 / 32  # of a chunk: what slices are worked on in does not grow with it
    assert {name: peaks for name, peaks in found.items() if max(peaks) >= 2 + mib} == {}
