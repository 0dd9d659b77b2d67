"""Owners: whose files and directories are, and who else may write to them.

Whoever may write where KV is kept chooses what a model reads. So what is there already is looked at
before it is used, by its descriptor, for a name may lead elsewhere a moment later; and what is made
is private whatever the umask.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import deque

from lmcache_core.errors import Refused

_THROUGH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""To go through a directory, for which it need not be readable."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_LINKS = 40


class Owners:
    """Who may have what is kept: this user alone, or all of a group that shares it on purpose.

    Raises Refused, with a sentence, for what is another's, and OSError for what cannot be done.
    """

    def __init__(self, group: int | None = None) -> None:
        """`group`: its number. Whoever is in it is trusted as this user is."""
        self.group = group
        self._directory_mode = 0o700 if group is None else 0o2770
        self._file_mode = 0o600 if group is None else 0o660
        self._others = 0o022 if group is None else 0o002
        """Bits of a mode that let others write."""

    def __repr__(self) -> str:
        return "Owners()" if self.group is None else f"Owners(group={self.group})"

    def owns(self, status: os.stat_result) -> bool:
        """Whether what lies in a directory of theirs is theirs, too."""
        return self.group is not None or status.st_uid == os.geteuid()

    def check(self, status: os.stat_result, path: str, unless: int = 0) -> None:
        """Raise Refused for what is another's, or open to others unless its mode has a bit."""
        user, mode = os.geteuid(), stat.S_IMODE(status.st_mode)
        if self.group is None and status.st_uid != user:
            raise Refused(f"{path} belongs to user {status.st_uid}, not to user {user}")
        if self.group is not None and status.st_gid != self.group:
            raise Refused(f"{path} belongs to group {status.st_gid}, not to group {self.group}")
        if mode & self._others and not mode & unless:
            raise Refused(f"{path} is open to other users, who may write to it (mode {mode:04o})")

    def check_file(self, status: os.stat_result, path: str) -> None:
        """Raise Refused for what is no file, has a second name elsewhere, or is another's."""
        if not stat.S_ISREG(status.st_mode):
            raise Refused(f"{path} is not a file")
        if status.st_nlink > 1:
            raise Refused(f"{path} has a second name: it is a hard link")
        self.check(status, path)

    def open_path(self, path: str) -> int:
        """A descriptor of a directory, which is made when missing, as is all above it.

        Links on the way are followed where they are this user's or the system's. Others may make
        something of theirs in it where its sticky bit keeps them from what is not.
        """
        at = self._checked(self._walk(os.path.abspath(path)), path, unless=stat.S_ISVTX)
        try:
            return os.open(".", _DIRECTORY, dir_fd=at)
        finally:
            os.close(at)

    def open_inside(self, at: int, name: str, path: str) -> int:
        """A descriptor of a directory in the directory `at`, made when missing; never of a link.
        `path`: how a message calls it."""
        try:
            found = self._enter(at, name, _DIRECTORY)
        except NotADirectoryError:
            raise Refused(f"{path} is not a directory, but a link or a file") from None
        return self._checked(found, path)

    def open_file(self, at: int, name: str, path: str) -> int:
        """A descriptor of a file in the directory `at`, to read and write, made when missing; never
        of a link."""
        try:
            found = os.open(name, _FILE, self._file_mode, dir_fd=at)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise Refused(f"{path} is not a file") from None
            raise
        try:
            self._keep(found, self._file_mode)
            self.check_file(os.fstat(found), path)
        except BaseException:
            os.close(found)
            raise
        return found

    def make_file(self, at: int, name: str) -> int:
        """A descriptor of a new file in the directory `at`, to write."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        made = os.open(name, flags, self._file_mode, dir_fd=at)
        self._keep(made, self._file_mode)
        return made

    def _walk(self, path: str) -> int:
        """The directory that an absolute path leads to."""
        at = os.open("/", _THROUGH)
        names, links = deque(path.split("/")), 0
        try:
            while names:
                name = names.popleft()
                target = _link(at, name) if name else ""
                if target is None:
                    at = _instead(at, self._enter(at, name, _THROUGH))
                elif target:
                    links += 1
                    if links > _MOST_LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                    names.extendleft(reversed(target.split("/")))
                    if target.startswith("/"):
                        at = _instead(at, os.open("/", _THROUGH))
        except BaseException:
            os.close(at)
            raise
        return at

    def _enter(self, at: int, name: str, flags: int) -> int:
        try:
            return os.open(name, flags, dir_fd=at)
        except FileNotFoundError:
            self._make_directory(at, name)
        return os.open(name, flags, dir_fd=at)

    def _make_directory(self, at: int, name: str) -> None:
        try:
            os.mkdir(name, self._directory_mode, dir_fd=at)
        except FileExistsError:  # another process was faster
            return
        try:
            made = os.open(name, _DIRECTORY, dir_fd=at)
        except PermissionError:  # the umask takes even our own rights
            os.chmod(name, self._directory_mode, dir_fd=at)
            made = os.open(name, _DIRECTORY, dir_fd=at)
        try:
            self._keep(made, self._directory_mode)
        finally:
            os.close(made)

    def _keep(self, fd: int, mode: int) -> None:
        """Give what is this user's alone the group and the mode that it is to have, where the file
        system can; `check` sees whether that is enough."""
        status = os.fstat(fd)
        linked = stat.S_ISREG(status.st_mode) and status.st_nlink > 1
        if linked or status.st_uid != os.geteuid():
            return
        with contextlib.suppress(PermissionError):
            if self.group is not None and status.st_gid != self.group:
                os.fchown(fd, -1, self.group)
            if stat.S_IMODE(status.st_mode) != mode:
                os.fchmod(fd, mode)

    def _checked(self, directory: int, path: str, unless: int = 0) -> int:
        try:
            self.check(os.fstat(directory), path, unless)
        except BaseException:
            os.close(directory)
            raise
        return directory


def _link(at: int, name: str) -> str | None:
    """Where a link in the directory `at` leads to; None for what is no link, or not there."""
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(name, dir_fd=at)
        if stat.S_ISLNK(status.st_mode):
            if status.st_uid not in (0, os.geteuid()):
                raise Refused(f"{name} is a link of user {status.st_uid}")
            return os.readlink(name, dir_fd=at)
    return None


def _instead(before: int, after: int) -> int:
    """The directory `after`, once the one that was left is closed."""
    os.close(before)
    return after
