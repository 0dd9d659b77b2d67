"""disk: one file a chunk. The directory is the index, so processes that share it need nothing else.

    <path>/chunks/<3 hex digits>/<64 hex digits>     a whole frame, always
    <path>/tmp/<random>-<bytes>                      a frame being written, its space reserved
    <path>/usage                                     bytes stored: one int64, changed under a lock

A file is written under a private name and renamed, so it is visible whole or not at all. Its
modification time is the chunk's last use; a sequence's root gets a later one than its leaves.
Lookups ask the file system. Only making room reads the directory: it takes the lock, counts
afresh (which also mends a count that a killed process left wrong) and removes the least recently
used files until a twentieth of the capacity is free.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import itertools
import os
import secrets
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmcache_core.backend import (
    Backoff,
    Buffers,
    ChunkKey,
    ConfigError,
    DeadlineExceeded,
    LocalPath,
    Options,
    Size,
    StorageBackend,
    StorageError,
    Stored,
    Transfer,
    file_system_bytes,
    nbytes_of,
)

_IOV_MAX = 1024
_PIECE = 2 << 20
"""Bytes to read at a time: on a disk that many loads share, each is to show that it moves."""
_STALE_SECONDS = 300.0
_OPEN_SECONDS = 10.0
_LOCK_SECONDS = (0.0001, 0.01)
"""Waits for the lock, which others hold for a write of eight bytes, or while they make room."""
_SLACK = 20
"""Making room frees 1/_SLACK of the capacity, so that one scan serves many writes."""


class DiskOptions(Options):
    """`path`: a directory, created when missing. `capacity`: bytes over all processes that share
    it. `fsync`: force each chunk to the medium before it becomes visible;
    without it a power cut may cost chunks, which their checksum turns into misses."""

    path: LocalPath
    capacity: Size
    fsync: bool = False

    def identity(self) -> str:
        """The directory, links followed."""
        return os.path.realpath(self.path)

    def medium_bytes(self) -> int:
        """Of the file system."""
        return file_system_bytes(self.path)

    @classmethod
    def from_lmcache(cls, url: str, extra: dict[str, Any]) -> dict[str, Any]:
        """Of `fs://host:port/path`: the path, without the limit that every tier has here."""
        path = "/" + url.partition("://")[2].partition("/")[2]
        raise ValueError(
            f"a shared file system is a tier of its own here: backend: disk, path: {path}, "
            "and a capacity"
        )


class DiskBackend(StorageBackend):
    """A directory of frames."""

    Options = DiskOptions
    schemes = ("fs",)
    medium, locality = "disk", "host"

    def __init__(self, options: DiskOptions) -> None:
        self._capacity = options.capacity
        self._fsync = options.fsync
        self._root = os.path.abspath(options.path)
        self._chunks = os.path.join(self._root, "chunks")
        self._tmp = os.path.join(self._root, "tmp")
        try:
            for directory in (self._root, self._chunks, self._tmp):
                os.makedirs(directory, mode=0o700, exist_ok=True)
            with self._locked(Transfer(_OPEN_SECONDS)) as usage:
                _write_usage(usage, self._reserved() + sum(size for _, size, _ in self._files()))
        except OSError as error:
            raise ConfigError(f"path: {self._root} cannot be used: {error.strerror}") from error

    def __repr__(self) -> str:
        return f"<DiskBackend {self._root}>"

    def contains(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        present = [os.access(self._path(key), os.F_OK) for key in keys]
        if not any(present):
            self._check()
        return present

    def get(self, keys: Sequence[ChunkKey], transfer: Transfer) -> Iterator[tuple[int, Buffers]]:
        for i, key in enumerate(keys):
            parts = self._read(self._path(key), transfer)
            if parts is not None:
                yield i, parts
            del parts

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> int:
        stored = 0
        for key, parts in frames:
            here = os.access(self._path(key), os.F_OK)
            if not here and not self._store(key, parts, prefix, transfer):
                break
            stored += 1
        return stored

    def delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        self._release(sum(_unlink(self._path(key)) for key in keys), transfer)

    def scan(self, transfer: Transfer) -> Iterator[Stored]:
        for path, nbytes, _ in self._files():
            yield Stored(ChunkKey.parse(os.path.basename(path)), nbytes)

    def touch(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        now = time.time_ns()
        for i, key in enumerate(keys):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._path(key), ns=(now - i, now - i))

    def ping(self, transfer: Transfer) -> None:
        """Read a chunk, if there is any."""
        self._check()
        path = next((path for path, _, _ in self._files()), None)
        if path is not None:
            self._read(path, transfer)

    def _check(self) -> None:
        if not os.path.isdir(self._chunks):
            raise StorageError(f"{self._chunks} is gone")

    def _path(self, key: ChunkKey) -> str:
        text = str(key)
        return f"{self._chunks}/{text[-3:]}/{text}"

    def _read(self, path: str, transfer: Transfer) -> Buffers | None:
        try:  # non-blocking, lest a FIFO that somebody put there holds the thread
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > self._capacity:
                return [memoryview(b"")]  # not a frame, which the tier finds out and removes
            buffer = transfer.allocate(status.st_size)
            transfer.moved(0)
            filled = 0
            while filled < buffer.nbytes:
                n = os.preadv(fd, [buffer[filled : filled + _PIECE]], filled)
                if n == 0:  # cut by somebody else; the frame's own length will not match
                    return [buffer[:filled]]
                filled += n
                transfer.moved(n)
            return [buffer]
        finally:
            os.close(fd)

    def _store(
        self, key: ChunkKey, parts: Buffers, prefix: Sequence[ChunkKey], transfer: Transfer
    ) -> bool:
        """Write a frame and show it; False where there is no room."""
        nbytes = nbytes_of(parts)
        try:
            tmp = self._reserve(nbytes, prefix, transfer)
            if tmp is not None:
                self._fill(tmp, key, parts, transfer)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return False  # the medium is full before our capacity is
            raise
        return tmp is not None

    def _fill(self, tmp: str, key: ChunkKey, parts: Buffers, transfer: Transfer) -> None:
        shown = False
        try:
            self._write(tmp, parts, transfer)
            shown = self._show(tmp, self._path(key))
        finally:
            if not shown:
                with contextlib.suppress(OSError):
                    os.unlink(tmp)
                    self._release(nbytes_of(parts), transfer)

    def _write(self, tmp: str, parts: Buffers, transfer: Transfer) -> None:
        fd = os.open(tmp, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if self._fsync:  # of what has to reach the medium nothing is seen until it has
                _write_all(fd, parts, lambda nbytes: None)
                os.fdatasync(fd)
            else:
                _write_all(fd, parts, transfer.moved)
        finally:
            os.close(fd)

    def _show(self, tmp: str, path: str) -> bool:
        """Give a written file its name; False where another process was faster."""
        if os.path.lexists(path):
            return False
        try:
            os.rename(tmp, path)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # only the last: the root may be unmounted
                os.mkdir(os.path.dirname(path), 0o700)
            os.rename(tmp, path)
        if self._fsync:
            _fsync_directory(os.path.dirname(path))
        return True

    def _reserve(self, nbytes: int, prefix: Sequence[ChunkKey], transfer: Transfer) -> str | None:
        """Make room, count `nbytes` as used and return an empty temporary file that says so."""
        if nbytes > self._capacity:
            return None
        with self._locked(transfer) as usage:
            used = _read_usage(usage)
            if used + nbytes > self._capacity:
                used = self._make_room(nbytes, prefix, transfer)
            if used + nbytes > self._capacity:
                _write_usage(usage, used)
                return None
            tmp = os.path.join(self._tmp, f"{secrets.token_hex(16)}-{nbytes}")
            os.close(os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            _write_usage(usage, used + nbytes)
        return tmp

    def _release(self, nbytes: int, transfer: Transfer) -> None:
        if nbytes:
            with self._locked(transfer) as usage:
                _write_usage(usage, max(0, _read_usage(usage) - nbytes))

    def _make_room(self, nbytes: int, prefix: Sequence[ChunkKey], transfer: Transfer) -> int:
        """Remove least recently used files; returns the bytes that are then used."""
        reserved = self._reserved()  # first, so that a file shown meanwhile counts twice, not never
        files = sorted(self._files(), key=lambda file: file[2])
        used = reserved + sum(size for _, size, _ in files)
        target = self._capacity - max(nbytes, self._capacity // _SLACK)
        keep = {str(key) for key in prefix}
        for path, _, _ in files:
            if used <= target:
                break
            name = os.path.basename(path)
            if name not in keep:
                used -= _unlink(path)
                transfer.evicted.append(ChunkKey.parse(name))
        return used

    def _files(self) -> Iterator[tuple[str, int, int]]:
        """(path, bytes, last use in ns) of every frame."""
        for directory in _entries(self._chunks):
            for file in _entries(directory.path):
                if len(file.name) != 64:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    yield file.path, status.st_size, status.st_mtime_ns

    def _reserved(self) -> int:
        """Bytes of frames being written; removes what a killed process left half written."""
        oldest = time.time() - _STALE_SECONDS
        reserved = 0
        for file in _entries(self._tmp):
            with contextlib.suppress(FileNotFoundError, ValueError):
                if file.stat().st_mtime < oldest:
                    os.unlink(file.path)
                else:
                    reserved += int(file.name.partition("-")[2])
        return reserved

    @contextlib.contextmanager
    def _locked(self, transfer: Transfer) -> Iterator[int]:
        """The usage file, locked. Its own open file keeps threads apart as well as processes."""
        path = os.path.join(self._root, "usage")
        usage = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(usage, transfer)
            yield usage
        finally:
            os.close(usage)  # releases the lock, as does a kill


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


def _read_usage(usage: int) -> int:
    data = os.pread(usage, 8, 0)
    return int(struct.unpack("<q", data)[0]) if len(data) == 8 else 0


def _write_usage(usage: int, nbytes: int) -> None:
    os.pwrite(usage, struct.pack("<q", nbytes), 0)


def _unlink(path: str) -> int:
    """Remove a file; the bytes that this freed. One that cannot be removed frees none."""
    try:
        nbytes = os.stat(path).st_size
        os.unlink(path)
    except OSError:
        return 0
    return nbytes


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _write_all(fd: int, parts: Buffers, moved: Callable[[int], None]) -> None:
    left = [part for part in parts if part.nbytes]
    while left:
        n = os.writev(fd, _first(left))
        moved(n)
        while left and n >= left[0].nbytes:
            n -= left.pop(0).nbytes
        if n:
            left[0] = left[0][n:]


def _first(parts: Buffers) -> Buffers:
    """As many of these as are to be written at a time."""
    if parts[0].nbytes >= _PIECE:
        return [parts[0][:_PIECE]]
    ends = itertools.accumulate(part.nbytes for part in parts[:_IOV_MAX])
    return parts[: max(1, bisect.bisect(list(ends), _PIECE))]


def _fsync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
