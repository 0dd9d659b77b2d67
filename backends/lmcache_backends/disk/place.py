"""Place: the directory of a store, held by descriptors.

    chunks/<3 hex digits>/<64 hex digits>     a whole frame, always
    tmp/<random>-<bytes>                      a frame being written, its space reserved
    usage                                     bytes stored: one int64, changed under a lock

What is here was looked at when it was opened, and cannot be exchanged for something else since. It
can be removed, or another file system mounted over it: `is_there` tells, and `again` looks anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

from lmcache_core.backend import Backoff, ChunkKey, DeadlineExceeded, Owners, StorageError, Transfer

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FRAME = re.compile(r"[0-9a-f]{64}")
_STALE_SECONDS = 300.0
_LOCK_SECONDS = (0.0001, 0.01)
"""Waits for the lock, which others hold for a write of eight bytes, or while they make room."""


class File(NamedTuple):
    """A frame's file."""

    key: ChunkKey
    nbytes: int
    used: int
    """When last, in ns."""


class Place:
    """A store's directory, open until nobody refers to it: what a thread works in is not closed
    under its hands."""

    def __init__(self, path: str, owners: Owners) -> None:
        """Make what is missing. Raises Refused for what is another's, OSError for the rest."""
        self.path = path
        self._owners = owners
        self._open: list[int] = []
        self.root = self._held(owners.open_path(path))
        self.chunks = self._held(owners.open_inside(self.root, "chunks", f"{path}/chunks"))
        self.tmp = self._held(owners.open_inside(self.root, "tmp", f"{path}/tmp"))
        self._device = os.fstat(self.root).st_dev

    def __repr__(self) -> str:
        return f"<Place {self.path}>"

    def _held(self, directory: int) -> int:
        self._open.append(directory)
        return directory

    def __del__(self) -> None:
        for directory in self._open:
            os.close(directory)

    def is_there(self) -> bool:
        """Whether `path` still leads here, and nothing was removed."""
        try:
            return all(
                os.path.samestat(os.stat(name, dir_fd=at), os.fstat(held))
                for name, at, held in (
                    (self.path, None, self.root),
                    ("chunks", self.root, self.chunks),
                    ("tmp", self.root, self.tmp),
                )
            )
        except (FileNotFoundError, NotADirectoryError):
            return False

    def again(self) -> Place:
        """Where `path` leads now, made anew where it was removed; but not on another file system:
        there the disk may not be mounted."""
        here = self.path
        while not os.path.exists(here):
            here = os.path.dirname(here)
        same = os.stat(here).st_dev == self._device
        if not same and not (here == self.path and os.path.isdir(f"{here}/chunks")):
            raise StorageError(f"{self.path} is gone, with the file system that it was on")
        return Place(self.path, self._owners)

    # Frames

    def frame(self, key: ChunkKey) -> str:
        """The name of a frame, in `chunks`."""
        text = str(key)
        return f"{text[-3:]}/{text}"

    def has(self, key: ChunkKey) -> bool:
        """Whether a frame is there, and not something else in its place."""
        try:
            status = os.lstat(self.frame(key), dir_fd=self.chunks)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return self.is_frame(status)

    def is_frame(self, status: os.stat_result) -> bool:
        """Whether something in the place of a frame may be one."""
        return stat.S_ISREG(status.st_mode) and self._owners.owns(status)

    def read(self, key: ChunkKey) -> int | None:
        """A descriptor to read a frame from; None where there is none."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        flags |= os.O_NONBLOCK  # lest a FIFO that somebody put there holds the thread
        try:
            return os.open(self.frame(key), flags, dir_fd=self.chunks)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                return None
            raise

    def files(self) -> Iterator[File]:
        """Every frame's."""
        for bucket in self.buckets():
            for file in _entries(bucket, self.chunks):
                if not (_FRAME.fullmatch(file.name) and file.name.endswith(bucket)):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat(follow_symlinks=False)
                    if self.is_frame(status):
                        key = ChunkKey.parse(file.name)
                        yield File(key, status.st_size, status.st_mtime_ns)

    def buckets(self) -> list[str]:
        """The names of the directories in `chunks`."""
        entries = _entries(".", self.chunks)
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]

    def used(self, key: ChunkKey, when: int) -> None:
        """Note when a frame was last used, in ns."""
        name = self.frame(key)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            try:
                os.utime(name, ns=(when, when), dir_fd=self.chunks, follow_symlinks=False)
            except PermissionError:  # another's of our group: only that it was used now
                os.utime(name, dir_fd=self.chunks, follow_symlinks=False)

    def draft(self, nbytes: int) -> str:
        """The name of a new file in `tmp`, to write a frame of so many bytes into."""
        name = f"{secrets.token_hex(16)}-{nbytes}"
        os.close(self._owners.make_file(self.tmp, name))
        return name

    def show(self, draft: str, key: ChunkKey, *, fsync: bool) -> bool:
        """Give a written file its name; False where another process was faster."""
        bucket, _, name = self.frame(key).partition("/")
        with self._bucket(bucket) as at:
            if self.has(key):
                return False
            with contextlib.suppress(FileNotFoundError):
                os.lstat(name, dir_fd=at)
                self._set_aside(name, at)
            os.rename(draft, name, src_dir_fd=self.tmp, dst_dir_fd=at)
            if fsync:
                os.fsync(at)
        return True

    def remove(self, key: ChunkKey) -> int:
        """Remove what is in the place of a frame; the bytes that this freed."""
        bucket, _, name = self.frame(key).partition("/")
        try:
            at = os.open(bucket, _DIRECTORY, dir_fd=self.chunks)
        except OSError:
            return 0
        try:
            nbytes = os.lstat(name, dir_fd=at).st_size if self.has(key) else 0
            os.unlink(name, dir_fd=at)
        except (IsADirectoryError, PermissionError):
            with contextlib.suppress(OSError):
                self._set_aside(name, at)
            return 0
        except OSError:
            return 0
        finally:
            os.close(at)
        return nbytes

    def remove_empty_buckets(self) -> None:
        """Give back what a file system takes for each."""
        for bucket in self.buckets():
            with contextlib.suppress(OSError):
                os.rmdir(bucket, dir_fd=self.chunks)

    @contextlib.contextmanager
    def _bucket(self, name: str) -> Iterator[int]:
        """A directory in `chunks`, made when missing; what else has its name is set aside."""
        try:
            is_directory = stat.S_ISDIR(os.lstat(name, dir_fd=self.chunks).st_mode)
        except FileNotFoundError:
            is_directory = True
        if not is_directory:
            self._set_aside(name, self.chunks)
        at = self._owners.open_inside(self.chunks, name, f"{self.path}/chunks/{name}")
        try:
            yield at
        finally:
            os.close(at)

    def _set_aside(self, name: str, at: int) -> None:
        """Take something that is no frame out of its place, whatever is in it."""
        os.rename(name, f"{secrets.token_hex(16)}-0", src_dir_fd=at, dst_dir_fd=self.tmp)

    # Space

    def usage(self, usage: int, freed: int = 0) -> int:
        """The bytes that the usage file says, without what was just freed; where it says nothing,
        those that are here."""
        data = os.pread(usage, 8, 0)
        said = int(struct.unpack("<q", data)[0]) if len(data) == 8 else -1
        return max(0, said - freed) if said >= 0 else self.count()

    def count(self) -> int:
        """The bytes that are here, and that are reserved."""
        return self.reserved() + sum(file.nbytes for file in self.files())

    def reserved(self) -> int:
        """Bytes of frames being written; removes what a killed process left half written."""
        oldest = time.time() - _STALE_SECONDS
        reserved = 0
        for file in _entries(".", self.tmp):
            with contextlib.suppress(FileNotFoundError, ValueError):
                if file.stat(follow_symlinks=False).st_mtime < oldest:
                    self._discard(file)
                else:
                    reserved += int(file.name.partition("-")[2])
        return reserved

    def _discard(self, file: os.DirEntry[str]) -> None:
        remove = os.rmdir if file.is_dir(follow_symlinks=False) else os.unlink
        with contextlib.suppress(OSError):  # what is in a directory that was set aside stays
            remove(file.name, dir_fd=self.tmp)

    @contextlib.contextmanager
    def locked(self, transfer: Transfer) -> Iterator[int]:
        """The usage file, locked. Its own open file keeps threads apart as well as processes."""
        usage = self._owners.open_file(self.root, "usage", f"{self.path}/usage")
        try:
            _lock(usage, transfer)
            yield usage
        finally:
            os.close(usage)  # releases the lock, as does a kill


def write_usage(usage: int, nbytes: int) -> None:
    """Have it say so many."""
    os.pwrite(usage, struct.pack("<q", nbytes), 0)


def _lock(usage: int, transfer: Transfer) -> None:
    """Take the lock as soon as nobody has it. The system's own waiting would not end."""
    waits = Backoff(*_LOCK_SECONDS)
    while True:
        try:
            return fcntl.flock(usage, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if transfer.remaining() <= 0:
                raise DeadlineExceeded("another process holds the lock") from None
        time.sleep(waits.next())


def _entries(name: str, at: int) -> Iterator[os.DirEntry[str]]:
    """What is in a directory of the directory `at`, a link apart."""
    try:
        directory = os.open(name, _DIRECTORY, dir_fd=at)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        with os.scandir(directory) as entries:
            yield from list(entries)
    finally:
        os.close(directory)
