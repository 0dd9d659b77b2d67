"""disk: one file a chunk. The directory is the index, so processes that share it need nothing else.

    <path>/chunks/<3 hex digits>/<64 hex digits>     a whole frame, always
    <path>/tmp/<random>                              a frame being written
    <path>/usage                                     bytes stored: one int64, changed under a lock

A file is written under a private name and renamed, so it is visible whole or not at all. Its
modification time is the chunk's last use; a sequence's root gets a later one than its leaves.
Lookups ask the file system. Only making room reads the directory: it takes the lock, counts
afresh (which also mends a count that a killed process left wrong) and removes the least recently
used files until a twentieth of the capacity is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lmcache_core import (
    Allocate,
    ChunkKey,
    ConfigError,
    Options,
    Parts,
    Size,
    StorageBackend,
    StorageError,
    Stored,
)

_READERS = 4
_IOV_MAX = 1024
_STALE_SECONDS = 300.0
_SLACK = 20
"""Making room frees 1/_SLACK of the capacity, so that one scan serves many writes."""


class DiskOptions(Options):
    """`path`: a directory, created if its parent exists. `capacity`: bytes over all processes
    that share it. `fsync`: force each chunk to the medium before it becomes visible; without it a
    power cut may cost chunks, which their checksum turns into misses."""

    path: Path
    capacity: Size
    fsync: bool = False

    def identity(self) -> str:
        """Two tiers of equal identity would be one store."""
        return os.path.realpath(self.path)


class DiskBackend(StorageBackend):
    """A directory of frames."""

    Options = DiskOptions

    def __init__(self, options: DiskOptions) -> None:
        self._capacity = options.capacity
        self._fsync = options.fsync
        self._root = os.path.abspath(options.path)
        self._chunks = os.path.join(self._root, "chunks")
        self._tmp = os.path.join(self._root, "tmp")
        try:
            for directory in (self._root, self._chunks, self._tmp):
                os.makedirs(directory, mode=0o700, exist_ok=True)
            self._remove_stale()
            self._usage = os.open(
                os.path.join(self._root, "usage"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise ConfigError(f"path: {self._root} cannot be used: {error.strerror}") from error
        with self._locked():
            self._write_usage(sum(nbytes for _, nbytes, _ in self._files()))
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="lmcache-disk")

    def contains(self, keys: Sequence[ChunkKey], timeout: float) -> list[bool]:
        present = [os.access(self._path(key), os.F_OK) for key in keys]
        if not any(present):
            self.ping(timeout)
        return present

    def get(
        self, keys: Sequence[ChunkKey], allocate: Allocate, timeout: float
    ) -> Iterator[tuple[int, Parts]]:
        waiting: deque[tuple[int, Future[Parts | None]]] = deque()
        try:
            for i, key in enumerate(keys):
                waiting.append((i, self._readers.submit(self._read, key, allocate)))
                if len(waiting) >= _READERS:
                    yield from _arrived(waiting, timeout)
            while waiting:
                yield from _arrived(waiting, timeout)
        finally:
            for _, future in waiting:
                future.cancel()

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Parts]],
        chain: Sequence[ChunkKey],
        timeout: float,
    ) -> int:
        self.touch(chain, timeout)
        keep = {str(key) for key in chain}
        stored = 0
        for key, parts in frames:
            if not os.access(self._path(key), os.F_OK):
                nbytes = sum(part.nbytes for part in parts)
                if not self._reserve(nbytes, keep):
                    break
                try:
                    written = self._write(key, parts)
                except OSError:
                    self._add_usage(-nbytes)
                    raise
                if not written:
                    self._add_usage(-nbytes)
            stored += 1
        self.touch(chain, timeout)
        return stored

    def delete(self, keys: Sequence[ChunkKey], timeout: float) -> None:
        freed = sum(self._unlink(self._path(key)) for key in keys)
        if freed:
            self._add_usage(-freed)

    def scan(self) -> Iterator[Stored]:
        for path, nbytes, _ in self._files():
            yield Stored(ChunkKey.parse(os.path.basename(path)), nbytes)

    def touch(self, keys: Sequence[ChunkKey], timeout: float) -> None:
        now = time.time_ns()
        for i, key in enumerate(keys):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._path(key), ns=(now - i, now - i))

    def ping(self, timeout: float) -> None:
        if not os.path.isdir(self._chunks):
            raise StorageError(f"{self._chunks} is gone")

    def close(self) -> None:
        self._readers.shutdown(wait=True, cancel_futures=True)
        os.close(self._usage)

    def _path(self, key: ChunkKey) -> str:
        text = str(key)
        return f"{self._chunks}/{text[-3:]}/{text}"

    def _read(self, key: ChunkKey, allocate: Allocate) -> Parts | None:
        try:
            fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            buffer = allocate(os.fstat(fd).st_size)
            filled = 0
            while filled < buffer.nbytes:
                n = os.preadv(fd, [buffer[filled:]], filled)
                if n == 0:  # cut by somebody else; the frame's own length will not match
                    return [buffer[:filled]]
                filled += n
            return [buffer]
        finally:
            os.close(fd)

    def _write(self, key: ChunkKey, parts: Parts) -> bool:
        """Write a frame and show it; False where another process showed it first."""
        tmp = os.path.join(self._tmp, secrets.token_hex(16))
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                _write_all(fd, parts)
                if self._fsync:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
            return self._show(tmp, self._path(key))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(tmp)

    def _show(self, tmp: str, path: str) -> bool:
        if os.path.lexists(path):
            return False
        try:
            os.rename(tmp, path)
        except FileNotFoundError:
            os.mkdir(os.path.dirname(path), 0o700)  # not its parents: the root may be unmounted
            os.rename(tmp, path)
        if self._fsync:
            _fsync_directory(os.path.dirname(path))
        return True

    def _reserve(self, nbytes: int, keep: set[str]) -> bool:
        """Count `nbytes` as used, making room first; False where that is impossible."""
        if nbytes > self._capacity:
            return False
        with self._locked():
            used = self._read_usage()
            if used + nbytes > self._capacity:
                used = self._make_room(nbytes, keep)
            fits = used + nbytes <= self._capacity
            self._write_usage(used + nbytes if fits else used)
        return fits

    def _make_room(self, nbytes: int, keep: set[str]) -> int:
        """Remove least recently used files; returns the bytes that are then used."""
        files = sorted(self._files(), key=lambda file: file[2])
        used = sum(size for _, size, _ in files)
        target = self._capacity - max(nbytes, self._capacity // _SLACK)
        evicted: list[ChunkKey] = []
        for path, _, _ in files:
            if used <= target:
                break
            name = os.path.basename(path)
            if name not in keep:
                used -= self._unlink(path)
                evicted.append(ChunkKey.parse(name))
        if evicted:
            self.on_evict(evicted)
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

    def _unlink(self, path: str) -> int:
        """Remove a file; the bytes that this freed. One that cannot be removed frees none."""
        try:
            nbytes = os.stat(path).st_size
            os.unlink(path)
        except OSError:
            return 0
        return nbytes

    def _remove_stale(self) -> None:
        """Remove what a killed process left half written."""
        oldest = time.time() - _STALE_SECONDS
        for file in _entries(self._tmp):
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_mtime < oldest:
                    os.unlink(file.path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclusive among processes and, through its own open file, among threads."""
        fd = os.open(f"/proc/self/fd/{self._usage}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)  # releases the lock, as does a kill

    def _add_usage(self, nbytes: int) -> None:
        with self._locked():
            self._write_usage(max(0, self._read_usage() + nbytes))

    def _read_usage(self) -> int:
        data = os.pread(self._usage, 8, 0)
        return int(struct.unpack("<q", data)[0]) if len(data) == 8 else 0

    def _write_usage(self, nbytes: int) -> None:
        os.pwrite(self._usage, struct.pack("<q", nbytes), 0)


def _arrived(
    waiting: deque[tuple[int, Future[Parts | None]]], timeout: float
) -> Iterator[tuple[int, Parts]]:
    i, future = waiting.popleft()
    parts = future.result(timeout)
    del future
    if parts is not None:
        yield i, parts


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _write_all(fd: int, parts: Parts) -> None:
    left = [part for part in parts if part.nbytes]
    while left:
        n = os.writev(fd, left[:_IOV_MAX])
        while left and n >= left[0].nbytes:
            n -= left.pop(0).nbytes
        if n:
            left[0] = left[0][n:]


def _fsync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
