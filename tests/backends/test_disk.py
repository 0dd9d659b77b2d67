"""disk: the conformance suite, and what only a shared directory can suffer."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from lmcache_backends import disk
from lmcache_backends.disk import DiskBackend, DiskOptions
from lmcache_core import ChunkKey, ConfigError, StorageBackend, StorageError
from lmcache_core.backend import Transfer
from lmcache_core.testing import SMALL, BackendConformance, no_leaks
from tests.backends.frames import Into, key, scan

GIB = 1 << 30


class RawFiles:
    """The directory, by the layout that the module documents."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: ChunkKey) -> Path:
        return self.root / "chunks" / str(key)[-3:] / str(key)

    def read(self, key: ChunkKey) -> bytes | None:
        path = self.path(key)
        return path.read_bytes() if path.exists() else None

    def write(self, key: ChunkKey, value: bytes) -> None:
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        self.path(key).write_bytes(value)

    def keys(self) -> set[ChunkKey]:
        return {ChunkKey.parse(path.name) for path in self.root.glob("chunks/*/*")}


def opener(path: Path, capacity: int = GIB, fsync: bool = False) -> Callable[[], DiskBackend]:
    return functools.partial(DiskBackend, DiskOptions(path=path, capacity=capacity, fsync=fsync))


@pytest.fixture
def raw(tmp_path: Path) -> RawFiles:
    return RawFiles(tmp_path)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[DiskBackend]:
    with no_leaks():
        backend = opener(tmp_path)()
        yield backend
        backend.close()


class TestDisk(BackendConformance):
    persistent = shared = bounded = True

    @pytest.fixture
    def raw(self, tmp_path: Path) -> RawFiles:
        return RawFiles(tmp_path)

    @pytest.fixture(params=[False, True], ids=["", "fsync"])
    def open_backend(
        self, tmp_path: Path, request: pytest.FixtureRequest
    ) -> Callable[[], StorageBackend]:
        return opener(tmp_path, fsync=request.param)

    @pytest.fixture
    def open_small(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return opener(tmp_path, SMALL)


def put(backend: StorageBackend, *numbers: int, nbytes: int = 1000) -> int:
    keys = [key(n) for n in numbers]
    value = memoryview(bytes(nbytes))
    return backend.put([(k, [value]) for k in keys], keys, Transfer(20.0))


def usage(path: Path) -> int:
    return int.from_bytes((path / "usage").read_bytes(), "little")


def left_over(path: Path) -> list[Path]:
    return list((path / "tmp").iterdir())


# Crashes


def write_on(path: Path, seed: int, opened: Event) -> None:
    """Store chunk after chunk, until killed."""
    backend = opener(path)()
    opened.set()
    for n in count(seed * 1_000_000):
        value = n.to_bytes(8, "little") * 40_000
        k = ChunkKey(random.Random(n).randbytes(32))
        backend.put([(k, [memoryview(value)[:11], memoryview(value)[11:]])], [k], Transfer(20.0))


def test_kill_9_at_any_moment_leaves_only_whole_chunks(tmp_path: Path, raw: RawFiles) -> None:
    chance, fork = random.Random(1), multiprocessing.get_context("fork")
    for seed in range(20):
        opened = fork.Event()
        writer = fork.Process(target=write_on, args=(tmp_path, seed, opened))
        writer.start()
        assert opened.wait(20)
        time.sleep(chance.uniform(0.01, 0.15))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
    keys = raw.keys()
    assert len(keys) > 50
    for k in keys:
        value = raw.read(k)
        assert len(value) == 320_000
        assert value == value[:8] * 40_000
    # What was half written is neither visible nor kept: a later process removes it.
    for file in left_over(tmp_path):
        os.utime(file, (0, 0))
    backend = opener(tmp_path)()
    assert left_over(tmp_path) == []
    assert usage(tmp_path) == 320_000 * len(keys)
    backend.close()


def test_a_count_that_a_crash_left_wrong_mends_itself(tmp_path: Path) -> None:
    backend = opener(tmp_path, SMALL)()
    put(backend, *range(5))
    (tmp_path / "usage").write_bytes((10 * SMALL).to_bytes(8, "little"))
    assert put(backend, 7) == 1
    assert usage(tmp_path) == 6000
    (tmp_path / "usage").write_bytes(b"")
    assert put(backend, 8) == 1
    backend.close()
    opener(tmp_path, SMALL)().close()
    assert usage(tmp_path) == 7000


# Trouble with the medium


def test_the_home_directory_may_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DiskOptions(path="~/kv", capacity=1).path == tmp_path / "kv"


@pytest.mark.parametrize("path", ["", " ", None])
def test_no_path_is_not_the_current_directory(path: str | None) -> None:
    with pytest.raises(ValueError, match="path"):
        DiskOptions(path=path, capacity=1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_medium_refuses_and_leaks_nothing(
    tmp_path: Path, backend: DiskBackend, raw: RawFiles, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    put(backend, 1)
    real = os.writev

    def full_after_some(fd: int, parts: list[memoryview]) -> int:
        if os.fstat(fd).st_size >= 400:
            raise OSError(code, os.strerror(code))
        return real(fd, [parts[0][:400]])

    monkeypatch.setattr(disk.os, "writev", full_after_some)
    assert put(backend, 2, 3) == 0
    assert raw.keys() == {key(1)}
    assert left_over(tmp_path) == []
    assert usage(tmp_path) == 1000
    monkeypatch.undo()
    assert put(backend, 2, 3) == 2


def test_a_write_error_is_an_error_and_leaks_nothing(
    tmp_path: Path, backend: DiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, parts: list[memoryview]) -> int:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(disk.os, "writev", broken)
    with pytest.raises(OSError, match="I/O error"):
        put(backend, 1)
    assert left_over(tmp_path) == []
    assert usage(tmp_path) == 0


def test_short_writes_go_on_where_they_ended(
    backend: DiskBackend, raw: RawFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.writev
    monkeypatch.setattr(disk.os, "writev", lambda fd, parts: real(fd, [parts[0][:7]]))
    value = random.Random(1).randbytes(1000)
    parts = [memoryview(value)[:13], memoryview(value)[13:]]
    assert backend.put([(key(1), parts)], [key(1)], Transfer(5.0)) == 1
    assert raw.read(key(1)) == value


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_a_really_full_file_system(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        backend = opener(mount)()
        stored = sum(put(backend, n, nbytes=100_000) for n in range(20))
        assert 5 <= stored <= 10
        assert len(scan(backend)) == stored
        assert left_over(mount) == []
        assert usage(mount) == 100_000 * stored
        backend.close()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_directory_that_is_removed_fails_and_works_again_when_it_is_back(
    tmp_path: Path,
) -> None:
    root = tmp_path / "cache"
    with no_leaks():
        backend = opener(root)()
        put(backend, 1)
        shutil.rmtree(root)
        with pytest.raises(StorageError, match="is gone"):
            backend.contains([key(1)], Transfer(1.0))
        with pytest.raises(StorageError):
            backend.ping(Transfer(1.0))
        with pytest.raises(OSError, match="No such file"):
            put(backend, 2)
        assert list(backend.get([key(1)], Into(1.0, lambda n: memoryview(bytearray(n))))) == []
        assert not root.exists()  # it may be a mount point: nothing is written beside it
        opener(root)().close()
        assert put(backend, 2) == 1
        backend.close()


def test_what_is_no_file_is_not_a_chunk_and_holds_nobody(
    tmp_path: Path, backend: DiskBackend, raw: RawFiles
) -> None:
    put(backend, 1, 2, 3)
    raw.path(key(1)).unlink()
    os.mkfifo(raw.path(key(1)))
    raw.path(key(2)).unlink()
    raw.path(key(2)).mkdir()
    got = {i: b"".join(p) for i, p in backend.get([key(n) for n in (1, 2, 3)], Transfer(1.0))}
    assert got == {0: b"", 1: b"", 2: bytes(1000)}


@pytest.mark.parametrize("path", ["file/cache", "file"])
def test_a_path_that_cannot_be_used_is_a_config_error(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"path: .* cannot be used: (Not a directory|File exists)"
    ):
        opener(tmp_path / path)()


# Several processes


def _fill(path: Path, seed: int, over: multiprocessing.SimpleQueue) -> None:
    backend = opener(path, 20 * SMALL)()
    peak = 0
    for n in range(120):
        put(backend, seed * 1000 + n, nbytes=SMALL // 4)
        if n % 4 == 0:
            peak = max(peak, sum(stored.nbytes for stored in scan(backend)))
    backend.close()
    over.put(peak)


def test_processes_that_share_a_directory_keep_to_one_capacity(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    peaks = processes.SimpleQueue()
    workers = [processes.Process(target=_fill, args=(tmp_path, n, peaks)) for n in range(4)]
    for worker in workers:
        worker.start()
    highest = max(peaks.get() for _ in workers)
    for worker in workers:
        worker.join(60)
    stored = sum(s.nbytes for s in scan(opener(tmp_path, 20 * SMALL)()))
    assert highest <= 20 * SMALL * 1.1
    assert 20 * SMALL * 0.8 <= stored <= 20 * SMALL


def test_a_stopped_process_that_holds_the_lock_does_not_stop_reads(tmp_path: Path) -> None:
    backend = opener(tmp_path)()
    put(backend, 1)
    program = (
        "import fcntl, os, sys, time; fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "usage")], stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    holder.send_signal(signal.SIGSTOP)
    assert backend.contains([key(1)], Transfer(1.0)) == [True]
    assert [i for i, _ in backend.get([key(1)], Transfer(1.0))] == [0]
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert put(backend, 2) == 1  # the lock went with its holder
    backend.close()


def test_a_reading_process_keeps_what_another_evicts(tmp_path: Path) -> None:
    one, two = opener(tmp_path, SMALL)(), opener(tmp_path, SMALL)()
    put(one, 1, nbytes=SMALL // 2)
    ((_, parts),) = one.get([key(1)], Transfer(1.0))
    for n in range(2, 9):
        put(two, n, nbytes=SMALL // 2)
    assert one.contains([key(1)], Transfer(1.0)) == [False]
    assert b"".join(parts) == bytes(SMALL // 2)
    one.close()
    two.close()


# Scale and details


def test_a_hundred_thousand_chunks_open_in_seconds(tmp_path: Path, raw: RawFiles) -> None:
    opener(tmp_path)().close()
    for n in range(100_000):
        path = raw.path(key(n))
        try:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        except FileNotFoundError:
            path.parent.mkdir()
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    began = time.monotonic()
    backend = opener(tmp_path)()
    assert time.monotonic() - began < 10
    assert backend.contains([key(n) for n in range(100)], Transfer(5.0)) == [True] * 100
    backend.close()


def test_one_round_of_making_room_serves_many_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opener(tmp_path, 100 * SMALL)()
    scans = 0
    real = DiskBackend._files

    def counting(self: DiskBackend) -> Iterator[tuple[str, int, int]]:
        nonlocal scans
        scans += 1
        return real(self)

    monkeypatch.setattr(DiskBackend, "_files", counting)
    for n in range(600):
        put(backend, n, nbytes=SMALL // 2)
    assert scans < 600 / 8
    backend.close()


def test_reading_lands_in_the_callers_buffer(backend: DiskBackend) -> None:
    put(backend, 1)
    buffers: list[memoryview] = []

    def allocate(nbytes: int) -> memoryview:
        buffers.append(memoryview(bytearray(nbytes)))
        return buffers[-1]

    ((_, parts),) = backend.get([key(1)], Into(1.0, allocate))
    assert [part.obj for part in parts] == [buffer.obj for buffer in buffers]


def test_a_slow_disk_is_told_from_one_that_hangs(
    backend: DiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large frames show that they move before they are whole."""
    put(backend, 1, nbytes=7 << 20)
    progress: list[int] = []
    real = os.preadv

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        progress.append(0)
        return real(fd, buffers, offset)

    class Noting(Transfer):
        def moved(self, nbytes: int) -> None:
            super().moved(nbytes)
            if nbytes:
                progress[-1] += 1

    monkeypatch.setattr(disk.os, "preadv", counting)
    ((_, parts),) = backend.get([key(1)], Noting(1.0))
    assert b"".join(parts) == bytes(7 << 20)
    assert progress == [1, 1, 1, 1]


def test_reading_a_chunk_costs_four_system_calls(
    backend: DiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(backend, 1, nbytes=1 << 20)
    calls: list[str] = []
    for name in ("open", "fstat", "preadv", "close", "stat", "access", "lseek", "read"):
        real = getattr(os, name)

        def counting(*args: object, real: object = real, name: str = name) -> object:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(disk.os, name, counting)
    list(backend.get([key(1)], Transfer(1.0)))
    assert calls == ["open", "fstat", "preadv", "close"]
