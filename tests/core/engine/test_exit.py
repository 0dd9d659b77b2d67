"""The interpreter ends while daemon threads are in the middle of loads and stores: it aborts where
it finds one in C++, so it waits for them, and for no store that hangs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("exits.py")


def check(folder: Path, exits: int, kinds: int, timeout: float) -> None:
    command = [sys.executable, PROGRAM, folder, exits, kinds]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout)
    assert ran.returncode == 0, ran.stderr[-3000:]


def test_it_does_not_abort(tmp_path: Path) -> None:
    check(tmp_path, 4, 2, 250.0)


@pytest.mark.soak
@pytest.mark.timeout(2000)
def test_it_does_not_abort_in_200(tmp_path: Path) -> None:
    check(tmp_path, 200, 2, 1900.0)
