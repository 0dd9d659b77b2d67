"""The process: what becomes of us in a child that is forked from it, and when it ends.

A child inherits memory and descriptors, but no thread other than the one that forked. So a lock may
be held there by nobody, for ever, and who waits for a thread waits for ever. Whoever owns such
things says here how it begins anew in a child; what belongs to the parent is left alone there, and
not even collected: its finalizers would speak for the parent.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from typing import Any, Protocol, TypeVar

L = TypeVar("L")


class Inherited(Protocol):
    """What a forked child may have of its parent."""

    def in_child(self) -> None:
        """Begin anew: this process is a forked child. No other thread runs yet."""


EXIT_SECONDS = 10.0
"""The most that the interpreter's end waits for daemon threads in the middle of C++, where it
aborts when it finds one. None stays there for long, but on a machine that has much else to do."""

_INHERITED: weakref.WeakSet[Inherited] = weakref.WeakSet()
_LOCKS: weakref.WeakSet[Any] = weakref.WeakSet()


def tell_children(thing: Inherited) -> None:
    """Have `thing.in_child` called in every child that is forked while it lives."""
    _INHERITED.add(thing)


def freed_in_children(lock: L) -> L:
    """`lock`, which a forked child has free, whoever held it in the parent."""
    _LOCKS.add(lock)
    return lock


def keep(thing: object) -> None:
    """Never collect `thing`, which is the parent's."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def ends() -> bool:
    """Whether the interpreter is about to end: only what `atexit` calls still runs."""
    return not threading.main_thread().is_alive()


def _begin_anew() -> None:
    for lock in list(_LOCKS):
        lock._at_fork_reinit()  # as threading and logging do with theirs
    for thing in list(_INHERITED):
        thing.in_child()


os.register_at_fork(after_in_child=_begin_anew)
