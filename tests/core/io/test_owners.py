"""Owners: what is made is private, what is another's is refused, and links lead nowhere else.

`tests/backends/test_disk.py` has the same for a whole store.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmcache_core.errors import Refused
from lmcache_core.io.owners import Owners
from tests.system import as_user, masked_by, needs_root

OURS, SHARED = Owners(), Owners(54321)


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.lstat().st_mode))


@pytest.fixture
def at(tmp_path: Path) -> Iterator[int]:
    """A directory's descriptor."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_what_is_made_is_private_whatever_the_umask(tmp_path: Path, at: int, umask: int) -> None:
    with masked_by(umask):
        os.close(OURS.open_path(str(tmp_path / "a" / "b" / "c")))
        os.close(OURS.open_inside(at, "inside", "inside"))
        os.close(OURS.open_file(at, "opened", "opened"))
        os.close(OURS.make_file(at, "new"))
    for name in ("a", "a/b", "a/b/c", "inside"):
        assert mode(tmp_path / name) == "0o700"
    for name in ("opened", "new"):
        assert mode(tmp_path / name) == "0o600"


@needs_root
def test_what_is_made_for_a_group_is_the_groups(tmp_path: Path, at: int) -> None:
    os.close(SHARED.open_path(str(tmp_path / "a" / "b")))
    os.close(SHARED.open_file(at, "file", "file"))
    for name in ("a", "a/b"):
        assert mode(tmp_path / name) == "0o2770"
    assert mode(tmp_path / "file") == "0o660"
    assert {(tmp_path / name).stat().st_gid for name in ("a", "a/b", "file")} == {54321}


def test_a_file_of_ours_that_others_could_read_is_made_private(tmp_path: Path, at: int) -> None:
    (tmp_path / "file").touch(mode=0o666)
    os.close(OURS.open_file(at, "file", "file"))
    assert mode(tmp_path / "file") == "0o600"


def symlink(path: Path) -> None:
    path.symlink_to("precious")


def hard_link(path: Path) -> None:
    path.hardlink_to(path.parent / "precious")


@pytest.mark.parametrize("make", [symlink, hard_link, os.mkfifo, Path.mkdir])
def test_only_a_file_of_one_name_is_a_file(
    tmp_path: Path, at: int, make: Callable[[Path], None]
) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "precious").chmod(0o644)
    make(tmp_path / "file")
    with pytest.raises(Refused, match=r"the file (is not a file|has a second name)"):
        SHARED.open_file(at, "file", "the file")
    assert mode(tmp_path / "precious") == "0o644"


@pytest.mark.parametrize("make", [symlink, Path.touch, os.mkfifo])
def test_inside_a_directory_links_are_not_followed(
    tmp_path: Path, at: int, make: Callable[[Path], None]
) -> None:
    (tmp_path / "precious").mkdir()
    make(tmp_path / "inside")
    with pytest.raises(Refused, match="it is not a directory, but a link or a file"):
        OURS.open_inside(at, "inside", "it")


def test_our_own_links_on_the_way_are_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "one").symlink_to("far/../far")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    os.close(OURS.open_path(f"{tmp_path}//two/./here"))
    assert (tmp_path / "far" / "here").is_dir()


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        OURS.open_path(str(tmp_path / "one"))


@needs_root
def test_one_link_of_another_user_on_the_way_is_enough(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "theirs").symlink_to("far")
    os.lchown(tmp_path / "theirs", 12345, 12345)
    (tmp_path / "ours").symlink_to("theirs")
    for path in ("theirs", "ours", "ours/further"):
        with pytest.raises(Refused, match="theirs is a link of user 12345"):
            OURS.open_path(str(tmp_path / path))


@needs_root
def test_the_systems_links_are_followed_by_every_user(open_tmp_path: Path) -> None:
    (open_tmp_path / "link").symlink_to("far")
    (open_tmp_path / "far").mkdir()
    os.chown(open_tmp_path / "far", 65534, 65534)
    assert as_user(65534, lambda: OURS.open_path(str(open_tmp_path / "link"))).isdigit()


@needs_root
def test_a_directory_that_is_the_systems_is_not_ours(open_tmp_path: Path) -> None:
    found = as_user(65534, lambda: OURS.open_path(str(open_tmp_path)))
    assert found == f"Refused: {open_tmp_path} belongs to user 0, not to user 65534"


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o722, 0o702])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, bits: int) -> None:
    tmp_path.chmod(bits)
    with pytest.raises(Refused, match=rf"is open to other users, .* \(mode {bits:04o}\)"):
        OURS.open_path(str(tmp_path))
    tmp_path.chmod(bits | stat.S_ISVTX)  # they cannot remove what is not theirs
    os.close(OURS.open_path(str(tmp_path)))


@pytest.mark.parametrize("bits", [0o700, 0o755, 0o711, 0o2750])
def test_a_directory_that_others_may_look_into_is_ours(tmp_path: Path, bits: int) -> None:
    tmp_path.chmod(bits)
    os.close(OURS.open_path(str(tmp_path)))
