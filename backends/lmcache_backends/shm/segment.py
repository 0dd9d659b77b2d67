"""The file of a shared-memory pool: created or joined, mapped, locked.

    /dev/shm/lmcache-<uid>-<pool>, mode 0600

Its first page holds 64-bit words (`Word`): what never changes, ending with where each column
begins, then the allocator's. Behind it lie the columns of `_columns`, each on a page of its own.

Two kinds of kernel lock, which a dying process releases wherever it is:

    flock on the file           the mutex, held for microseconds
    byte n of the file (OFD)    held for as long as member n lives

Both belong to descriptors opened for them alone: a forked child inherits mappings, which would keep
the description of a mapped file, and its locks, alive. The child closes its copies at once.

Who wants the mutex opens the file for it, so that threads exclude each other as processes do, and
whatever ends its holder's call, an interrupt (Ctrl-C) between any two lines included, closes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import math
import mmap
import os
import struct
import time
import weakref
from functools import partial

import numpy as np

from lmcache_core.backend import (
    Backoff,
    ConfigError,
    DeadlineExceeded,
    Owners,
    Refused,
    StorageError,
    Transfer,
    host_register,
    start_thread,
    tell_children,
)

DIRECTORY = "/dev/shm"
PAGE = 4096
STEP = 1 << 20
"""Bytes that are mapped ahead at a time."""
_POPULATE_READ = 22
"""From Linux' mman.h, since 5.14; Python does not name it."""
MEMBERS = 64
"""Open backends that a pool can have at a time; one byte each in a chunk's lease line."""
_LOCK_SECONDS = (20e-6, 1e-3)
"""Waits for the mutex, which others hold for microseconds."""
_OPEN_SECONDS = 10.0
_SLOT_EACH = 32 << 10
_MAGIC = int.from_bytes(b"LMCPOOL\0", "little")
_VERSION = 1
_LIBC = ctypes.CDLL(None)  # whose calls let other threads run
_LIBC.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_FLOCK = struct.Struct("hhqqi4x")


class Word:
    """The words of the first page. Not an Enum: Python 3.11 takes longer to look one up than to
    use it."""

    MAGIC = 0  # written last: a pool without it was never finished
    VERSION = 1
    CAPACITY = 2  # bytes, as configured
    BYTES = 3  # of the file
    SLOTS = 4
    PAGES = 5
    DIRTY = 6  # 1 while its holder changes what is derived from the slots
    HIGH = 7  # no slot from here on was ever used
    LOW = 8  # no slot below is free
    CURSOR = 9  # where the search for free pages begins
    FREE = 10  # free pages
    LONGEST = 11  # no run of free pages is longer
    COLUMNS = 16  # the first of the columns' offsets


class Segment:
    """The mapped file. Columns are numpy arrays on it; a subscript is one load or store."""

    state: np.ndarray
    owner: np.ndarray
    taken: np.ndarray
    members: np.ndarray
    index: np.ndarray
    keys: np.ndarray
    start: np.ndarray
    nbytes: np.ndarray
    first: np.ndarray
    pages: np.ndarray
    used: np.ndarray
    leases: np.ndarray
    data: np.ndarray
    memory: mmap.mmap

    def __init__(self, pool: str, capacity: int) -> None:
        """Create the pool's file or join it. Raises ConfigError where that cannot be."""
        self.path = path_of(pool)
        self._pid = os.getpid()
        self.at: dict[str, int] = {}
        """Where each column begins, in `memory`."""
        self.holders: weakref.WeakSet[Mutex] = weakref.WeakSet()
        """Of this process: who has the mutex, or tries to."""
        self._fd = _open_locked(self.path)
        tell_children(self)
        try:
            _create_or_check(self._fd, self.path, capacity)
            self._map()
        except BaseException:
            self.close()
            raise
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        with contextlib.suppress(RuntimeError):  # no thread can be had
            start_thread(partial(self._map_ahead, self.whole), "lmcache-shm-map")

    def _map(self) -> None:
        size = os.fstat(self._fd).st_size
        mapped = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self.memory = mmap.mmap(mapped, size)
        finally:
            os.close(mapped)
        self.words = np.frombuffer(self.memory, np.int64, PAGE // 8)
        self.whole = np.frombuffer(self.memory, np.uint8)
        host_register(self.whole)
        offset = PAGE
        for name, dtype, shape in _columns(int(self.words[Word.CAPACITY])):
            column = np.frombuffer(self.memory, dtype, math.prod(shape), offset).reshape(shape)
            setattr(self, name, column)
            self.at[name] = offset
            offset += _padded(column.nbytes)

    def _map_ahead(self, whole: np.ndarray) -> None:
        """Map all pages into this process, beside what it does.

        A page that is mapped only when it is touched costs a load a third of its time. Where the
        kernel cannot map ahead, that stays so.
        """
        begin, end = whole.ctypes.data, whole.ctypes.data + whole.nbytes
        for at in range(begin, end, STEP):
            if self._fd < 0 or _LIBC.madvise(at, min(STEP, end - at), _POPULATE_READ):
                return

    def check(self) -> None:
        """Raise StorageError where the mapping must not be touched or nobody else joins it."""
        if os.getpid() != self._pid:
            raise StorageError("opened before a fork: the child has to open its own")
        if self._fd < 0:
            raise StorageError("closed")
        status = os.fstat(self._fd)
        if status.st_size < self.whole.nbytes:
            raise StorageError(f"{self.path} was cut to {status.st_size} bytes")
        if not status.st_nlink:
            raise StorageError(f"{self.path} was deleted")

    def in_child(self) -> None:
        """Let go of the parent's locks."""
        for mutex in list(self.holders):
            mutex.close()
        self.close()

    @property
    def usable(self) -> bool:
        """Whether the mapping may be touched by what was opened here."""
        if os.getpid() != self._pid or self._fd < 0:
            return False
        return os.fstat(self._fd).st_size >= self.whole.nbytes

    def mutex(self, transfer: Transfer) -> Mutex:
        """The mutex, for `with`. Raises DeadlineExceeded where another has it until `transfer`
        ends."""
        self.check()
        mutex = Mutex(self.path, "rb")
        try:
            self.holders.add(mutex)
            self._lock(mutex.fileno(), transfer)
        except BaseException:
            mutex.close()
            raise
        return mutex

    def _lock(self, fd: int, transfer: Transfer) -> None:
        if not os.path.sameopenfile(fd, self._fd):
            raise StorageError(f"{self.path} was deleted")
        waits = Backoff(*_LOCK_SECONDS)
        while not _has_locked(fd):
            if transfer.remaining() <= 0:
                raise DeadlineExceeded(f"another holds the lock for {transfer.timeout:.3g} s")
            time.sleep(waits.next())

    @property
    def held(self) -> bool:
        """Whether this process has the mutex, or tries to."""
        return not all(mutex.closed for mutex in list(self.holders))

    def join(self, member: int) -> bool:
        """Become this member for as long as the descriptor is open, unless another is."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _range(fcntl.F_WRLCK, member))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def lives(self, member: int) -> bool:
        """Whether another process, or backend of this one, is this member."""
        return _is_held(self._fd, member)

    def close(self) -> None:
        """Leave. The mapping goes with the last view on it, of which none is ours."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        for name in [name for name, value in vars(self).items() if isinstance(value, np.ndarray)]:
            delattr(self, name)
        vars(self).pop("memory", None)


class Mutex(io.FileIO):
    """A descriptor of the pool's file that has its lock until it is closed. `with` a FileIO is
    entered and left in C, where no interrupt is raised."""


def path_of(pool: str) -> str:
    """The file of this user's pool of that name."""
    return f"{DIRECTORY}/lmcache-{os.geteuid()}-{pool}"


def living_members(fd: int) -> int:
    """How many backends have the pool open."""
    return sum(_is_held(fd, member) for member in range(MEMBERS))


def read_words(fd: int) -> np.ndarray | None:
    """The first page of a finished pool of this version, or None."""
    page = os.pread(fd, PAGE, 0)
    words = np.frombuffer(page, np.int64, len(page) // 8)
    finished = len(page) == PAGE and words[Word.MAGIC] == _MAGIC
    return words if finished and words[Word.VERSION] == _VERSION else None


def _columns(capacity: int) -> list[tuple[str, type[np.generic], tuple[int, ...]]]:
    """Name, type and shape of what lies behind the first page, in order.

    A slot takes 154 bytes and the share of the index, 16 to 32 more.
    """
    slots = 1024 + capacity // _SLOT_EACH
    pages = max(1, capacity // PAGE)
    buckets = 1 << (slots // 2).bit_length()
    return [
        ("state", np.uint8, (slots,)),
        ("owner", np.uint8, (slots,)),  # member that fills it
        ("taken", np.uint8, (pages,)),  # derived: 1 where a slot has the page
        ("members", np.uint8, (MEMBERS,)),  # 1 where one joined; whether it lives says its lock
        ("index", np.uint32, (buckets, 8)),  # derived: slots by hash of the key; 0 is none
        ("keys", np.uint64, (slots, 4)),
        ("start", np.int64, (slots,)),  # of the frame in `data`
        ("nbytes", np.int64, (slots,)),  # of the frame
        ("first", np.int64, (slots,)),  # its first page
        ("pages", np.int64, (slots,)),
        ("used", np.int64, (slots,)),  # when last, in ns of the monotonic clock
        ("leases", np.uint8, (slots, MEMBERS)),  # written by the member alone
        ("data", np.uint8, (pages * PAGE,)),
    ]


def _open_locked(path: str) -> int:
    """The file, existing or new and empty, with its mutex held."""
    end = time.monotonic() + _OPEN_SECONDS
    waits = Backoff(*_LOCK_SECONDS)
    while True:
        fd = _open_own(path)
        if _has_locked(fd) and _is_at(fd, path):
            return fd
        os.close(fd)  # held by another, or removed by `clear` or a failed creation
        if time.monotonic() > end:
            raise StorageError(f"a process holds the lock of {path}")
        time.sleep(waits.next())


def _open_own(path: str) -> int:
    """The file, existing or new and empty; ConfigError where it is not this user's alone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        with contextlib.suppress(OSError):
            _check_owner(os.lstat(path), path)
        raise ConfigError(f"pool: {path} cannot be opened: {error.strerror}") from error
    try:
        _check_owner(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_owner(status: os.stat_result, path: str) -> None:
    try:
        Owners().check_file(status, path)
    except Refused as error:
        raise ConfigError(f"pool: {error}; remove it or take another name") from None
    if status.st_mode & 0o077:
        raise ConfigError(f"pool: {path} is open to other users; remove it or take another name")


def _has_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _create_or_check(fd: int, path: str, capacity: int) -> None:
    page = os.pread(fd, PAGE, 0)
    words = np.frombuffer(page.ljust(PAGE, b"\0"), np.int64)
    if words[Word.MAGIC] == 0:  # new, or its creator was killed
        _create(fd, path, capacity)
        return
    clear = "stop its users and run `python -m lmcache_backends.shm clear`"
    if words[Word.MAGIC] != _MAGIC:
        raise ConfigError(f"pool: {path} is not a pool")
    if words[Word.VERSION] != _VERSION:
        version = words[Word.VERSION]
        raise ConfigError(f"pool: {path} has layout version {version}, not {_VERSION}; {clear}")
    if words[Word.CAPACITY] != capacity:
        has = words[Word.CAPACITY]
        raise ConfigError(f"capacity: {path} was created with {has} bytes, not {capacity}; {clear}")
    if os.fstat(fd).st_size != words[Word.BYTES]:
        raise ConfigError(f"pool: {path} was cut or extended; {clear}")


def _create(fd: int, path: str, capacity: int) -> None:
    words = np.zeros(PAGE // 8, np.int64)
    offset = PAGE
    columns = _columns(capacity)
    for number, (_, dtype, shape) in enumerate(columns):
        words[Word.COLUMNS + number] = offset
        offset += _padded(math.prod(shape) * np.dtype(dtype).itemsize)
    pages = max(1, capacity // PAGE)
    words[[Word.VERSION, Word.CAPACITY, Word.BYTES]] = _VERSION, capacity, offset
    words[[Word.SLOTS, Word.PAGES]] = columns[0][2][0], pages
    words[[Word.HIGH, Word.LOW, Word.FREE, Word.LONGEST]] = 1, 1, pages, pages
    try:
        os.fchmod(fd, 0o600)  # of which a umask may have taken some
        os.ftruncate(fd, 0)
        os.posix_fallocate(fd, 0, offset)  # now, or a full /dev/shm would be a SIGBUS later
        os.pwrite(fd, words.tobytes(), 0)
        os.pwrite(fd, _MAGIC.to_bytes(8, "little"), 0)
    except OSError as error:
        os.unlink(path)
        free = os.statvfs(DIRECTORY)
        raise ConfigError(
            f"capacity: {path} would take {offset} bytes, and {DIRECTORY} has "
            f"{free.f_bavail * free.f_frsize} free: {error.strerror}"
        ) from error


def _padded(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _range(kind: int, member: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, member, 1, 0)


def _is_held(fd: int, member: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _range(fcntl.F_WRLCK, member))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
