"""disk: the conformance suite, and what only a shared directory can suffer."""

from __future__ import annotations

import contextlib
import errno
import functools
import grp
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from lmcache_backends.disk import DiskBackend, DiskOptions
from lmcache_backends.disk.place import File, Place
from lmcache_core import ChunkKey, ConfigError
from lmcache_core.backend import StorageBackend, Transfer
from lmcache_core.errors import StorageError
from lmcache_core.testing import SMALL, BackendConformance, no_leaks
from tests.backends.frames import Into, key, scan
from tests.system import as_user, masked_by, mounted, needs_root

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


def raw_keys(path: Path) -> set[ChunkKey]:
    return RawFiles(path).keys()


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
    backend.close()


@pytest.mark.parametrize(
    "harm", [b"", b"cut", (-(1 << 60)).to_bytes(8, "little", signed=True), None]
)
def test_a_count_that_is_none_lets_nothing_grow_beyond_the_capacity(
    tmp_path: Path, harm: bytes | None
) -> None:
    backend = opener(tmp_path, SMALL)()
    put(backend, *range(5))
    if harm is None:
        (tmp_path / "usage").unlink()
    else:
        (tmp_path / "usage").write_bytes(harm)
    assert put(backend, 5) == 1
    assert usage(tmp_path) == 6000
    (tmp_path / "usage").write_bytes(harm or b"")
    backend.delete([key(0)], Transfer(1.0))
    assert usage(tmp_path) == 5000
    for n in range(6, 200):
        put(backend, n)
    assert sum(stored.nbytes for stored in scan(backend)) <= SMALL
    backend.close()


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

    monkeypatch.setattr(os, "writev", full_after_some)
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

    monkeypatch.setattr(os, "writev", broken)
    with pytest.raises(OSError, match="I/O error"):
        put(backend, 1)
    assert left_over(tmp_path) == []
    assert usage(tmp_path) == 0


def test_short_writes_go_on_where_they_ended(
    backend: DiskBackend, raw: RawFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, parts: real(fd, [parts[0][:7]]))
    value = random.Random(1).randbytes(1000)
    parts = [memoryview(value)[:13], memoryview(value)[13:]]
    assert backend.put([(key(1), parts)], [key(1)], Transfer(5.0)) == 1
    assert raw.read(key(1)) == value


# A medium that is full before the capacity is


@needs_root
def test_a_full_file_system_makes_room_among_its_own(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=1m") as mount:
        backend = opener(mount)()
        evicted: set[bytes] = set()
        for n in range(30):
            transfer = Transfer(20.0)
            assert backend.put([(key(n), [memoryview(bytes(100_000))])], [key(n)], transfer) == 1
            evicted |= set(transfer.evicted)
        there = {stored.key for stored in scan(backend)}
        assert len(there) >= 5
        assert there | evicted == {key(n) for n in range(30)}
        assert not there & evicted
        assert key(29) in there  # the last that came, and what was used long ago is gone
        assert key(0) not in there
        assert left_over(mount) == []
        assert usage(mount) == 100_000 * len(there)
        backend.close()


@needs_root
def test_a_file_system_without_more_files_makes_room_among_its_own(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "nr_inodes=40") as mount:
        backend = opener(mount)()
        for n in range(200):  # each in a directory of its own, which takes one, too
            assert put(backend, n, nbytes=100) == 1
        assert len(scan(backend)) >= 15
        assert left_over(mount) == []
        backend.close()


@needs_root
def test_what_others_fill_leaves_room_when_they_go(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=1m") as mount:
        backend = opener(mount / "kv")()
        (mount / "others").write_bytes(bytes((1 << 20) - 150_000))
        assert put(backend, 1, nbytes=100_000) == 1
        assert put(backend, 2, nbytes=100_000) == 1
        assert raw_keys(mount / "kv") == {key(2)}
        assert put(backend, 3, nbytes=500_000) == 0  # nothing of ours could make room for it
        assert raw_keys(mount / "kv") == {key(2)}
        (mount / "others").unlink()
        assert put(backend, 3, nbytes=500_000) == 1
        assert raw_keys(mount / "kv") == {key(2), key(3)}
        backend.close()


@needs_root
def test_a_medium_that_is_full_at_the_start_is_no_mistake_of_the_configuration(
    tmp_path: Path,
) -> None:
    full = pytest.raises(StorageError, match="cannot be used: No space left on device")
    with mounted(tmp_path / "small", "nr_inodes=3") as mount, full:
        opener(mount / "kv")()


# What is removed under a living engine


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("what", ["everything in it", "tmp", "chunks", "usage", "itself"])
def test_what_is_removed_is_made_anew(tmp_path: Path, what: str) -> None:
    root = tmp_path / "above" / "cache"
    backend = opener(root)()
    put(backend, 1)
    within = {"everything in it": list(root.iterdir()), "itself": [root]}
    for path in within.get(what, [root / what]):
        remove(path)
    kept = what in ("tmp", "usage")
    assert put(backend, 2) == 1
    assert backend.contains([key(1), key(2), key(3)], Transfer(1.0)) == [kept, True, False]
    assert usage(root) == (2000 if kept else 1000)
    assert root.stat().st_mode & 0o777 == 0o700
    backend.close()


def test_a_lookup_that_finds_all_gone_is_a_miss_and_makes_it_anew(tmp_path: Path) -> None:
    backend = opener(tmp_path / "cache")()
    put(backend, 1)
    shutil.rmtree(tmp_path / "cache")
    assert backend.contains([key(1)], Transfer(1.0)) == [False]
    assert list(backend.get([key(1)], Transfer(1.0))) == []
    backend.ping(Transfer(1.0))
    assert usage(tmp_path / "cache") == 0
    backend.close()


def test_two_processes_meet_again_after_all_was_removed(tmp_path: Path) -> None:
    one, two = opener(tmp_path / "cache")(), opener(tmp_path / "cache")()
    shutil.rmtree(tmp_path / "cache")
    assert put(one, 1) == 1
    assert two.contains([key(1)], Transfer(1.0)) == [False]  # and it looked where the other is
    assert two.contains([key(1)], Transfer(1.0)) == [True]
    one.close()
    two.close()


@needs_root
def test_nothing_is_written_where_a_disk_is_not_mounted(tmp_path: Path) -> None:
    with mounted(tmp_path / "elsewhere", "size=1m") as elsewhere:
        place = tmp_path / "disk"
        place.mkdir(mode=0o700)
        subprocess.run(["mount", "--bind", str(elsewhere), str(place)], check=True)
        backend = opener(place)()
        put(backend, 1)
        subprocess.run(["umount", "-l", str(place)], check=True)
        remove(elsewhere / "chunks")
        with pytest.raises(StorageError, match="is gone, with the file system that it was on"):
            put(backend, 2)
        with pytest.raises(StorageError, match="is gone"):
            backend.ping(Transfer(1.0))
        assert list(place.iterdir()) == []
        subprocess.run(["mount", "--bind", str(elsewhere), str(place)], check=True)
        backend.ping(Transfer(1.0))
        assert put(backend, 2) == 1
        assert raw_keys(place) == {key(2)}
        backend.close()
        subprocess.run(["umount", str(place)], check=True)


# Something else in the place of a frame


def directory(path: Path) -> None:
    path.mkdir()


def filled_directory(path: Path) -> None:
    path.mkdir()
    (path / "what somebody wrote").write_text("there")


def socket_file(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path.name)


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def anothers_file(path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can make a file of another user")
    path.write_bytes(bytes(1000))
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize(
    "make",
    [directory, filled_directory, os.mkfifo, socket_file, link, link_to_itself, anothers_file],
)
def test_what_is_no_frame_is_absent_and_gives_way(
    tmp_path: Path, backend: DiskBackend, raw: RawFiles, make: Callable[[Path], None]
) -> None:
    put(backend, 1, 2)
    raw.path(key(1)).unlink()
    make(raw.path(key(1)))
    assert backend.contains([key(1), key(2)], Transfer(1.0)) == [False, True]
    assert [i for i, _ in backend.get([key(1), key(2)], Transfer(1.0))] == [1]
    assert {stored.key for stored in scan(backend)} == {key(2)}
    assert put(backend, 1) == 1
    assert raw.read(key(1)) == bytes(1000)
    backend.delete([key(1)], Transfer(1.0))
    make(raw.path(key(1)))
    backend.delete([key(1)], Transfer(1.0))
    assert not os.path.lexists(raw.path(key(1)))


def test_what_somebody_put_there_is_kept(
    tmp_path: Path, backend: DiskBackend, raw: RawFiles
) -> None:
    raw.path(key(1)).parent.mkdir()
    filled_directory(raw.path(key(1)))
    assert put(backend, 1) == 1
    for old in left_over(tmp_path):
        os.utime(old, (0, 0))
    opener(tmp_path)().close()  # which removes what is left over
    assert [path.read_text() for path in tmp_path.rglob("what somebody wrote")] == ["there"]


@pytest.mark.parametrize("make", [link, os.mkfifo, Path.touch])
def test_what_is_no_directory_of_frames_gives_way(
    backend: DiskBackend, raw: RawFiles, make: Callable[[Path], None]
) -> None:
    make(raw.path(key(1)).parent)
    assert backend.contains([key(1)], Transfer(1.0)) == [False]
    assert put(backend, 1) == 1
    assert raw.read(key(1)) == bytes(1000)


def test_a_frame_that_cannot_be_opened_is_one_that_cannot_be_read(
    backend: DiskBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(backend, 1)

    def forbidden(self: Place, key: ChunkKey) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Place, "read", forbidden)
    ((_, parts),) = backend.get([key(1)], Transfer(1.0))
    assert b"".join(parts) == b""  # so that the tier removes it


# Whose it is

ATTACKER = 12345


def give(path: Path) -> Path:
    os.chown(path, ATTACKER, ATTACKER, follow_symlinks=False)
    return path


def made(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


def filled(path: Path) -> Path:
    path.write_bytes(bytes(8))
    return path


def open_to_all(path: Path) -> None:
    path.mkdir(exist_ok=True)
    path.chmod(0o777)


def linked(path: Path, to: Path) -> Path:
    path.symlink_to(to)
    return path


TRAPS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "another's": (
        lambda root, mine: give(root),
        r"path: .*/root belongs to user 12345, not to user 0; give a directory that is this user's",
    ),
    "open to all": (
        lambda root, mine: open_to_all(root),
        r"path: .*/root is open to other users, who may write to it \(mode 0777\); give a directory",
    ),
    "open to its group": (
        lambda root, mine: root.chmod(0o770),
        r"/root is open to other users, who may write to it \(mode 0770\); .* group: NAME",
    ),
    "chunks, another's": (
        lambda root, mine: give(made(root / "chunks")),
        "/root/chunks belongs to user 12345",
    ),
    "chunks, open to all": (
        lambda root, mine: open_to_all(root / "chunks"),
        r"/root/chunks is open to other users, .* \(mode 0777\)",
    ),
    "chunks, a link": (
        lambda root, mine: linked(root / "chunks", mine),
        "/root/chunks is not a directory, but a link or a file",
    ),
    "tmp, a link": (
        lambda root, mine: linked(root / "tmp", mine),
        "/root/tmp is not a directory, but a link or a file",
    ),
    "usage, a link": (
        lambda root, mine: linked(root / "usage", mine / "file"),
        "/root/usage is not a file",
    ),
    "usage, a hard link": (
        lambda root, mine: os.link(mine / "file", root / "usage"),
        "/root/usage has a second name: it is a hard link",
    ),
    "usage, a fifo": (lambda root, mine: os.mkfifo(root / "usage"), "/root/usage is not a file"),
    "usage, a directory": (
        lambda root, mine: (root / "usage").mkdir(),
        "/root/usage is not a file",
    ),
    "usage, another's": (
        lambda root, mine: give(filled(root / "usage")),
        "/root/usage belongs to user 12345",
    ),
}


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Path]:
    """A directory of ours with files, one of them named like a frame, that nobody touches."""
    mine = tmp_path / "mine"
    (mine / "aaa").mkdir(parents=True)
    mine.chmod(0o700)
    files = {mine / "file": "precious", mine / "aaa" / ("a" * 64): "precious, too"}
    for path, text in files.items():
        path.write_text(text)
        os.utime(path, (0, 0))
    yield mine
    assert {path: path.read_text() for path in mine.rglob("*") if path.is_file()} == files
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


@needs_root
@pytest.mark.parametrize("kind", TRAPS)
def test_what_another_user_has_prepared_is_refused(tmp_path: Path, mine: Path, kind: str) -> None:
    make, sentence = TRAPS[kind]
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    make(root, mine)
    with pytest.raises(ConfigError, match=sentence):
        opener(root, capacity=5000)()


@needs_root
@pytest.mark.parametrize("rest", ["", "cache"])
def test_links_of_another_user_are_not_followed(tmp_path: Path, mine: Path, rest: str) -> None:
    there = give(linked(tmp_path / "link", mine))
    with pytest.raises(ConfigError, match="link is a link of user 12345"):
        opener(there / rest)()


@needs_root
def test_what_is_exchanged_meanwhile_is_refused(tmp_path: Path, mine: Path) -> None:
    root = tmp_path / "root"
    backend = opener(root)()
    shutil.rmtree(root / "chunks")
    (root / "chunks").symlink_to(mine)
    with pytest.raises(StorageError, match="not a directory, but a link"):
        put(backend, 1)
    (root / "chunks").unlink()
    (root / "usage").unlink()
    (root / "usage").symlink_to(mine / "file")
    with pytest.raises(StorageError, match="is not a file"):
        put(backend, 1)
    (root / "usage").unlink()
    assert put(backend, 1) == 1
    backend.close()


@needs_root
def test_the_systems_directory_for_all_may_hold_one(tmp_path: Path) -> None:
    """Its sticky bit keeps others from what they did not make."""
    tmp_path.chmod(0o1777)
    opener(tmp_path)().close()
    assert (tmp_path / "chunks").stat().st_mode & 0o777 == 0o700


def test_our_own_links_are_followed_to_the_directory(tmp_path: Path) -> None:
    (tmp_path / "large" / "kv").mkdir(parents=True)
    (tmp_path / "near").symlink_to("large")
    (tmp_path / "here").symlink_to(tmp_path / "near" / "kv" / "." / ".." / "kv")
    backend = opener(tmp_path / "here" / "cache")()
    assert put(backend, 1) == 1
    assert raw_keys(tmp_path / "large" / "kv" / "cache") == {key(1)}
    backend.close()


def modes(root: Path) -> dict[str, str]:
    return {path.name: oct(path.stat().st_mode & 0o7777) for path in [root, *root.rglob("*")]}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_all_that_is_made_is_private_whatever_the_umask(open_tmp_path: Path, umask: int) -> None:
    above = open_tmp_path / "above"

    def work() -> int:
        with masked_by(umask):
            backend = opener(above / "between" / "cache", capacity=3000)()
            return put(backend, 1) + put(backend, 2) + put(backend, 3) + put(backend, 4)

    if os.getuid():
        assert work() == 4
    else:  # root may do what a mode forbids
        open_tmp_path.chmod(0o777)
        assert as_user(65534, work) == "4"
    found = modes(above)
    files = {name: mode for name, mode in found.items() if len(name) == 64 or name == "usage"}
    assert len(files) > 1
    assert set(files.values()) == {"0o600"}
    assert {mode for name, mode in found.items() if name not in files} == {"0o700"}


# A group that shares it


def opener_for(group: int | str, path: Path) -> Callable[[], DiskBackend]:
    options = DiskOptions(path=path, capacity=4000, group=group)
    return functools.partial(DiskBackend, options)


@needs_root
def test_a_group_shares_a_directory_and_nobody_else(open_tmp_path: Path) -> None:
    open_tmp_path.chmod(0o777)
    root, group = open_tmp_path / "cache", 54321

    def first() -> int:
        return put(opener_for(group, root)(), 1, 2, 3)

    def second() -> list[bool]:
        backend = opener_for(group, root)()
        backend.touch([key(1)], Transfer(1.0))
        loaded = [i for i, parts in backend.get([key(1), key(2)], Transfer(1.0))]
        assert loaded == [0, 1]
        backend.delete([key(2)], Transfer(1.0))
        assert put(backend, 4, 5, 6) == 3
        return backend.contains([key(n) for n in (1, 2, 3)], Transfer(1.0))

    def third() -> int:
        return put(opener(root)(), 9)

    assert as_user(1001, first, gid=group) == "3"
    assert as_user(1002, second, gid=group) == "[True, False, False]"
    assert as_user(1001, lambda: put(opener_for(group, root)(), 7), gid=group) == "1"
    found = modes(root)
    files = {name: mode for name, mode in found.items() if len(name) == 64 or name == "usage"}
    assert set(files.values()) == {"0o660"}
    assert {mode for name, mode in found.items() if name not in files} == {"0o2770"}
    assert {path.stat().st_gid for path in root.rglob("*")} == {group}
    assert "belongs to user 1001, not to user 1003" in as_user(1003, third, gid=group)
    outside = as_user(1004, opener_for(group, root))
    assert outside == "ConfigError: group: user 1004, as whom this runs, is not in group 54321"


@needs_root
def test_a_directory_of_another_group_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    opener_for(1, root)().close()
    with pytest.raises(ConfigError, match="belongs to group 1, not to group 2"):
        opener_for(2, root)()
    root.chmod(0o2777)
    with pytest.raises(ConfigError, match="is open to other users"):
        opener_for(1, root)()


def test_a_group_has_a_name_or_a_number(tmp_path: Path) -> None:
    name = grp.getgrgid(os.getgid()).gr_name
    assert opener_for(name, tmp_path).args[0].group == os.getgid()
    assert opener_for("54321", tmp_path).args[0].group == 54321
    for wrong in ("nobody has this name", "", -1, True, 1.5):
        with pytest.raises(ValueError, match="expected a group of this host, by name or number"):
            opener_for(wrong, tmp_path)


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
    real = Place.files

    def counting(self: Place) -> Iterator[File]:
        nonlocal scans
        scans += 1
        return real(self)

    monkeypatch.setattr(Place, "files", counting)
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

    monkeypatch.setattr(os, "preadv", counting)
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

        def counting(
            *args: object, real: object = real, name: str = name, **more: object
        ) -> object:
            calls.append(name)
            return real(*args, **more)

        monkeypatch.setattr(os, name, counting)
    list(backend.get([key(1)], Transfer(1.0)))
    monkeypatch.undo()
    assert calls == ["open", "fstat", "preadv", "close"]
