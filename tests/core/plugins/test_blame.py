"""What somebody else's exception says, and whose it is."""

from __future__ import annotations

import pytest

from lmcache_core.plugins.blame import cause, culprit

SECRET = "hunter2SECRET"


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


def test_a_cause_has_one_line_and_no_secret_whatever_the_exception_is() -> None:
    assert cause(Mute()) == "Mute without a text"
    assert cause(SystemExit(3)) == "SystemExit(3)"
    assert cause(OSError(f"two\nlines of redis://u:{SECRET}@h")) == "two lines of redis://***@h"
    assert cause(ValueError()) == "ValueError()"
    assert len(cause(ValueError("x" * 10_000))) == 500


class Store:
    def get(self) -> None:
        raise Mute

    def contains(self) -> int:
        return 5


def test_an_author_sees_the_line_that_raised_or_the_method_that_lied() -> None:
    with pytest.raises(Mute) as raised:
        Store().get()
    first = Store.get.__code__.co_firstlineno
    assert culprit(raised.value, Store(), "get").endswith(f"test_blame.py:{first + 1})")
    first = Store.contains.__code__.co_firstlineno
    assert culprit(TypeError(), Store(), "contains").endswith(f"test_blame.py:{first})")
    assert ".Store (" in culprit(TypeError(), Store(), "no such method")
    assert culprit(TypeError(), 5) == "builtins.int"
