"""What a test does as root: be another user for a while, and mount a small file system."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")


def as_user(
    uid: int, work: Callable[[], object], *, gid: int | None = None, umask: int = 0o022
) -> str:
    """What a child of this user and of no other group returns, or raises, as text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.umask(umask)
            os.setgroups([])
            os.setgid(uid if gid is None else gid)
            os.setuid(uid)
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode()[:4096])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@contextlib.contextmanager
def mounted(at: Path, options: str) -> Iterator[Path]:
    """A tmpfs with these options on the directory `at`, which is made."""
    at.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs", str(at)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], capture_output=True, check=False)


@contextlib.contextmanager
def masked_by(umask: int) -> Iterator[None]:
    """Another umask."""
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)
