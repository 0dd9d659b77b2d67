"""Secrets: masked wherever a URL or its remains are shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from lmcache_core.backend import Options
from lmcache_core.plugins.secrets import masked, shown

WORD = "hunter2SECRET"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"redis://u:{WORD}@h:6379/0", "redis://***@h:6379/0"),
        (f"redis://u:{WORD}@h1:6379,h2:26379/0", "redis://***@h1:6379,h2:26379/0"),
        (f"redis://u:{WORD}@h:bad", "redis://***@h:***"),
        (f"redis:/u:{WORD}@h", "redis:/***@h"),
        (f"memcached:u:{WORD}@h", "memcached:***@h"),
        (f"s3://KEY:{WORD}", "s3://KEY:***"),
        (f"s3://KEY:1{WORD}/with/slashes", "s3://KEY:***"),
        (f"http://h/?password={WORD}", "http://h/?***"),
        (f"password={WORD}, user=u", "password=***, user=u"),
        (f"Login('u', password='a b {WORD}')", "Login('u', password=***)"),
        (f"{{'secret_access_key': '{WORD}', 'x': 1}}", "{'secret_access_key': ***, 'x': 1}"),
        ("encrypt.key_env: no such variable", "encrypt.key_env: no such variable"),
        ("256 tokens=8 keys=1", "256 tokens=8 keys=1"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("http://127.0.0.1:9000/x", "http://127.0.0.1:9000/x"),
        ("redis://h:6379: connection refused", "redis://h:6379: connection refused"),
        ("cache.yaml:4: tiers[0].capacity: expected", "cache.yaml:4: tiers[0].capacity: expected"),
        ("10:30:00 /var/cache/kv", "10:30:00 /var/cache/kv"),
    ],
)
def test_a_url_in_a_sentence_keeps_what_helps(text: str, left: str) -> None:
    assert masked(text) == left
    assert masked(f"error: {text}") == f"error: {left}"


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("lots", "'lots'"),
        ("/var/cache/lmcache", "'/var/cache/lmcache'"),
        (f"u:{WORD}", "'u:***'"),
        (f"redis:u:{WORD}", "'redis:u:***'"),
        (f"redis://u:has {WORD} blanks@h", "'redis://***@h'"),
        ("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "'***'"),
        ({"password": WORD, "level": 3}, "{password: *** (not shown), level: 3}"),
        ([f"redis://u:{WORD}@h"], "['redis://***@h']"),
        (SecretStr(WORD), "SecretStr('**********')"),
    ],
)
def test_a_value_is_shown_without_what_may_be_a_secret(value: object, left: str) -> None:
    assert shown(value) == left


@given(
    st.sampled_from(["redis://", "memcached:", "s3://", "", "http:/", " redis://"]),
    st.text(max_size=5),
    st.text(alphabet=" :/@?#'\"%", max_size=3),
    st.text(max_size=5),
)
def test_nothing_before_an_at_is_ever_shown(scheme: str, user: str, odd: str, host: str) -> None:
    url = f"{scheme}{user}:{odd}{WORD}{odd}@{host}"
    assert WORD not in shown(url)


class Foreign(Options):
    url: str
    password: str = ""
    mirrors: tuple[str, ...] = ()
    level: int = 3


def test_options_show_no_secret_though_their_fields_are_plain() -> None:
    url = f"lmdb://u:{WORD}@h"
    options = Foreign(url=url, password=WORD, mirrors=(url,))
    assert repr(options) == (
        "Foreign(url='lmdb://***@h', password=*** (not shown), mirrors=['lmdb://***@h'], level=3)"
    )
    assert WORD not in str(options)


def test_options_built_by_hand_show_no_secret_in_their_errors() -> None:
    with pytest.raises(ValidationError) as caught:
        Foreign(url=f"lmdb://u:{WORD}@h", level=WORD)  # type: ignore[arg-type]
    assert WORD not in str(caught.value)
