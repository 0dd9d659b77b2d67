"""Forged frames, some thousand of them here and a million by `make fuzz`: misses, nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is allocated")
def test_forged_frames_are_misses_take_no_memory_and_do_not_wait() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.serde.fuzz", "--count", "10000"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 10
    for name, came in found.items():
        assert came["damaged"] > 300, name
        # MiB of address space; each new thread may reserve 64 for its arena. A chunk has a few KiB.
        assert came["space"] < 256, name
        assert came.get("read", 0) or "encrypt" in name, name
