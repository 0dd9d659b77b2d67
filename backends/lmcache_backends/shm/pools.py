"""Shared-memory pools that were left, on the command line.

python -m lmcache_backends.shm list             this user's pools
python -m lmcache_backends.shm clear [POOL...]  remove those that are not in use, or these
"""

from __future__ import annotations

import glob
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress

from lmcache_backends.shm.segment import PAGE, Word, living_members, path_of, read_words

_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


def main(arguments: Sequence[str]) -> int:
    """The command line; returns its exit status."""
    command, *names = arguments or ["help"]
    if command == "list" and not names:
        for name, path in _pools():
            with suppress(FileNotFoundError):  # removed meanwhile, as everywhere below
                print(f"{name}\t{_described(path)}")
    elif command == "clear":
        pools = dict(_pools())
        for name, path in pools.items():
            with suppress(FileNotFoundError):
                if name in names or not (names or _members(path)):
                    os.unlink(path)
                    print(f"{name}\tremoved")
        missing = [name for name in names if name not in pools]
        if missing:
            print(f"no such pool: {', '.join(missing)}", file=sys.stderr)
            return 1
    else:
        print((__doc__ or "").rpartition("\n\n")[2].rstrip(), file=sys.stderr)
        return 2
    return 0


def _pools() -> list[tuple[str, str]]:
    """Name and file of this user's pools; what else has such a name is told of."""
    prefix = path_of("")
    pools = []
    for path in sorted(glob.glob(f"{prefix}*")):
        with suppress(FileNotFoundError):
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                pools.append((path.removeprefix(prefix), path))
            else:
                print(f"passed over, for it is no file of this user: {path}", file=sys.stderr)
    return pools


def _members(path: str) -> int:
    fd = os.open(path, _FLAGS)
    try:
        return living_members(fd)
    finally:
        os.close(fd)


def _described(path: str) -> str:
    fd = os.open(path, _FLAGS)
    try:
        words = read_words(fd)
        if words is None:
            return "unfinished, or of another layout version"
        used = (words[Word.PAGES] - words[Word.FREE]) * PAGE
        return f"{used} of {words[Word.CAPACITY]} bytes\t{living_members(fd)} in use"
    finally:
        os.close(fd)
