"""disk: one file a chunk. The directory is the index, so processes that share it need nothing else.

A file is written under a private name and renamed, so it is visible whole or not at all. Its
modification time is the chunk's last use; a sequence's root gets a later one than its leaves.
Lookups ask the file system. Only making room reads the directory: it takes the lock, counts
afresh (which also mends a count that a killed process left wrong) and removes the least recently
used files until a twentieth of the capacity is free; or of what is there, where the medium is full
before.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import grp
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from lmcache_backends.disk.place import Place, write_usage
from lmcache_core.backend import (
    Buffers,
    ChunkKey,
    ConfigError,
    LocalPath,
    Options,
    Owners,
    Refused,
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
_OPEN_SECONDS = 10.0
_SLACK = 20
"""Making room frees 1/_SLACK of the capacity, so that one scan serves many writes."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a medium says that has no more bytes, or no more files, for anybody or for this user."""
_INSTEAD = (
    "give a directory that is this user's alone (one that is not there is made), or say the group "
    "that shares it: group: NAME"
)
_TRIES = 3
"""Times to write a frame on a medium that is full, or from which directories are removed."""


def _group(value: object) -> int:
    if isinstance(value, str) and value and not value.isdecimal():
        try:
            return grp.getgrnam(value).gr_gid
        except KeyError:
            raise ValueError("expected a group of this host, by name or number") from None
    if isinstance(value, int | str) and not isinstance(value, bool) and str(value).isdecimal():
        return int(value)
    raise ValueError("expected a group of this host, by name or number")


class DiskOptions(Options):
    """`path`: a directory, created when missing. `capacity`: bytes over all processes that share
    it. `fsync`: force each chunk to the medium before it becomes visible;
    without it a power cut may cost chunks, which their checksum turns into misses. `group`: whose
    members share the directory, which otherwise is this user's alone."""

    path: LocalPath
    capacity: Size
    fsync: bool = False
    group: Annotated[int, BeforeValidator(_group)] | None = None

    def identity(self) -> str:
        """The directory, links followed."""
        return os.path.realpath(self.path)

    def made(self) -> bool:
        """Whether the directory is there."""
        return os.path.isdir(self.path)

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
        self._path = os.path.abspath(options.path)
        self._renewing = threading.Lock()
        _check_member(options.group)
        try:
            self._opened: Place | None = Place(self._path, Owners(options.group))
            self._count(self._opened, Transfer(_OPEN_SECONDS))
        except Refused as error:
            raise ConfigError(f"path: {error}; {_INSTEAD}") from error
        except OSError as error:
            kind = StorageError if error.errno in _FULL else ConfigError
            raise kind(f"path: {self._path} cannot be used: {error.strerror}") from error

    def __repr__(self) -> str:
        return f"<DiskBackend {self._path}>"

    @property
    def _place(self) -> Place:
        """Whoever works in it holds it, for it may be another one a moment later."""
        if self._opened is None:
            raise StorageError("closed")
        return self._opened

    def contains(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        place = self._place
        present = [place.has(key) for key in keys]
        if not any(present):
            self._renew(transfer)
        return present

    def get(self, keys: Sequence[ChunkKey], transfer: Transfer) -> Iterator[tuple[int, Buffers]]:
        place = self._place
        for i, key in enumerate(keys):
            parts = self._read(place, key, transfer)
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
            here = self._place.has(key)
            if not here and not self._store(key, parts, prefix, transfer):
                break
            stored += 1
        return stored

    def delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        place = self._place
        self._release(place, sum(place.remove(key) for key in keys), transfer)

    def scan(self, transfer: Transfer) -> Iterator[Stored]:
        for file in self._place.files():
            yield Stored(file.key, file.nbytes)

    def touch(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        place, now = self._place, time.time_ns()
        for i in range(len(keys) - 1, -1, -1):  # the root last, so that it was used last
            place.used(keys[i], now - i)

    def ping(self, transfer: Transfer) -> None:
        """Read a chunk, if there is any."""
        self._renew(transfer)
        place = self._place
        file = next(place.files(), None)
        if file is not None:
            self._read(place, file.key, transfer)

    def close(self) -> None:
        self._opened = None

    def _renew(self, transfer: Transfer) -> None:
        """Make anew what was removed of the directory. Raises where that cannot be."""
        with self._renewing:
            if not self._place.is_there():
                place = self._place.again()
                self._count(place, transfer)
                self._opened = place

    def _count(self, place: Place, transfer: Transfer) -> None:
        with place.locked(transfer) as usage:
            write_usage(usage, place.count())

    def _read(self, place: Place, key: ChunkKey, transfer: Transfer) -> Buffers | None:
        try:
            fd = place.read(key)
        except PermissionError:
            return [memoryview(b"")]  # no frame for this user: the tier removes it
        if fd is None:
            return None
        try:
            status = os.fstat(fd)
            if not place.is_frame(status):
                return None
            if status.st_size > min(self._capacity, transfer.limit):
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
        for left in reversed(range(_TRIES)):
            try:
                return self._write(self._place, key, parts, prefix, transfer)
            except FileNotFoundError:  # a directory was removed
                if not left:
                    raise
                self._renew(transfer)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if not self._make_room_on_medium(self._place, nbytes_of(parts), prefix, transfer):
                    return False
        return False

    def _write(
        self,
        place: Place,
        key: ChunkKey,
        parts: Buffers,
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> bool:
        draft = self._reserve(place, nbytes_of(parts), prefix, transfer)
        if draft is None:
            return False
        shown = False
        try:
            self._fill(place, draft, parts, transfer)
            shown = place.show(draft, key, fsync=self._fsync)
        finally:
            if not shown:
                with contextlib.suppress(OSError):
                    os.unlink(draft, dir_fd=place.tmp)
                    self._release(place, nbytes_of(parts), transfer)
        return True

    def _fill(self, place: Place, draft: str, parts: Buffers, transfer: Transfer) -> None:
        fd = os.open(draft, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place.tmp)
        try:
            if self._fsync:  # of what has to reach the medium nothing is seen until it has
                _write_all(fd, parts, lambda nbytes: None)
                os.fdatasync(fd)
            else:
                _write_all(fd, parts, transfer.moved)
        finally:
            os.close(fd)

    # Room

    def _reserve(
        self, place: Place, nbytes: int, prefix: Sequence[ChunkKey], transfer: Transfer
    ) -> str | None:
        """Make room, count `nbytes` as used and return an empty draft that says so."""
        if nbytes > self._capacity:
            return None
        with place.locked(transfer) as usage:
            used = place.usage(usage)
            if used + nbytes > self._capacity:
                used = self._evict(place, nbytes, prefix, transfer, self._capacity)
            if used + nbytes > self._capacity:
                write_usage(usage, used)
                return None
            draft = place.draft(nbytes)
            write_usage(usage, used + nbytes)
        return draft

    def _release(self, place: Place, nbytes: int, transfer: Transfer) -> None:
        if nbytes:
            with place.locked(transfer) as usage:
                write_usage(usage, place.usage(usage, freed=nbytes))

    def _make_room_on_medium(
        self, place: Place, nbytes: int, prefix: Sequence[ChunkKey], transfer: Transfer
    ) -> bool:
        """Remove frames where the medium has no more than what is here; False where none can go."""
        before = len(transfer.evicted)
        with place.locked(transfer) as usage:
            write_usage(usage, self._evict(place, nbytes, prefix, transfer, None))
        place.remove_empty_buckets()
        return len(transfer.evicted) > before

    def _evict(
        self,
        place: Place,
        nbytes: int,
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
        room: int | None,
    ) -> int:
        """Remove the least recently used frames of a store that has `room`, or just what is here;
        returns the bytes that are then used.

        For a sequence that is larger than that nothing is: it would not be there as a whole.
        """
        reserved = place.reserved()  # first, so that a file shown meanwhile counts twice, not never
        files = sorted(place.files(), key=lambda file: file.used)
        used = reserved + sum(file.nbytes for file in files)
        room = used if room is None else room
        if nbytes * len(prefix) > room:
            return used
        target = room - max(nbytes, room // _SLACK)
        keep = set(prefix)
        for file in files:
            if used <= target:
                break
            freed = 0 if file.key in keep else place.remove(file.key)
            if freed:
                used -= freed
                transfer.evicted.append(file.key)
        return used


def _check_member(group: int | None) -> None:
    if group is not None and os.geteuid() and group not in (os.getegid(), *os.getgroups()):
        raise ConfigError(f"group: user {os.geteuid()}, as whom this runs, is not in group {group}")


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
