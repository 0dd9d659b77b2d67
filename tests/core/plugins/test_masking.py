"""What may be a secret is shown to nobody, wherever it was written by mistake."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_core.plugins.blame import cause, culprit
from lmcache_core.plugins.masking import masked, masked_value, names_secret

SECRET = "hunter2SECRET"


@pytest.mark.parametrize(
    "text",
    [
        f"redis://u:{SECRET}@h",
        f"redis://:{SECRET}@h:6379/0",
        f"rediss://u:a@b:{SECRET}@h:bad",
        f"memcached:u:{SECRET}@h",
        f"memcached:/u:{SECRET}@h",
        f"u:{SECRET}@h",
        f"s3://KEY:{SECRET}",
        f"s3://KEY:{SECRET}/prefix",
        f"s3://{SECRET}:KEY@bucket",
        f"unknown backend 'redis://u:{SECRET}@h', did you mean 'redis'?",
        f"url=SecretStr('redis://u:{SECRET}@h')",
        f"http://h/?password={SECRET}&x=1",
        f"{{'secret_access_key': '{SECRET}', 'region': 'x'}}",
        f"Login(user='u', password='a b {SECRET}')",
    ],
)
def test_a_secret_is_masked_in_every_spelling(text: str) -> None:
    assert SECRET not in masked(text)


@pytest.mark.parametrize(
    "text",
    [
        "redis://h1:6379,h2:6379/0",
        "redis://[::1]:6379/0",
        "http://127.0.0.1:8333/bucket: refused",
        "connecting to http://h:80: refused",
        "tiers[0].password_env: no variable FOO",
        "expected 256 tokens; found 3 keys",
        "/var/cache/lmcache: No space left on device",
    ],
)
def test_what_helps_stays(text: str) -> None:
    assert masked(text) == text


@given(st.text(st.characters(exclude_characters="@", exclude_categories=["Z", "C"]), min_size=8))
def test_whatever_stands_before_an_at_is_masked(password: str) -> None:
    for url in (f"redis://u:{password}@h", f"redis:u:{password}@h", f"{password}@h"):
        shown = masked(f"no answer from {url} in time")
        assert password not in shown
        assert shown.startswith("no answer from ")
        assert shown.endswith("@h in time")


def test_values_are_masked_by_the_name_of_their_key() -> None:
    assert SECRET not in masked_value("password", SECRET)
    assert SECRET not in masked_value("", {"options": {"token": SECRET}, "url": f"a:{SECRET}@h"})
    assert SECRET not in masked_value("url", f"redis://u:with blanks {SECRET}@h")
    assert SECRET not in masked_value("servers", [f"redis://u:{SECRET}@h"])
    assert masked_value("capacity", "8GiB") == "'8GiB'"
    assert [n for n in ("api_key", "key_env", "salt", "keys", "url", "chunk_tokens") if names_secret(n)] == ["api_key", "key_env", "salt"]  # fmt: skip


# Blame.


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
    assert culprit(raised.value, Store(), "get").endswith(f"test_masking.py:{first + 1})")
    first = Store.contains.__code__.co_firstlineno
    assert culprit(TypeError(), Store(), "contains").endswith(f"test_masking.py:{first})")
    assert ".Store (" in culprit(TypeError(), Store(), "no such method")
    assert culprit(TypeError(), 5) == "builtins.int"
