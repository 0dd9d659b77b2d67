"""encrypt: opens with the right key, under the right chunk key, and not otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import lmcache_core
from lmcache_core import Chunk, ConfigError, Namespace, unverified
from lmcache_core.backend import component
from lmcache_core.connector import tenant_digest
from lmcache_core.errors import FrameError
from lmcache_core.frames.frame import decode, encode
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.serde import Serde
from lmcache_core.testing import SerdeConformance, make_chunk, tiny_layout
from lmcache_core.testing.frames import forged
from lmcache_serde import encrypt
from lmcache_serde.encrypt import Encrypt

KEY, OTHER = "0f" * 32, "1e" * 32


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", OTHER)


def made(**options: Any) -> Encrypt:
    return Encrypt(Encrypt.Options(**options))


def frame_of(chunk: Chunk, **options: Any) -> bytes:
    return b"".join(encode(chunk, Pipeline([made(**options)])))


class TestEncrypt(SerdeConformance):
    checks_itself = True
    deterministic = False

    @pytest.fixture
    def serde(self, _keys: None) -> Serde:
        return made(key_env="KV_KEY")


def test_a_key_comes_from_a_file_too_raw_or_as_hex(tmp_path: Path) -> None:
    chunk = make_chunk(tiny_layout(), 9)
    (tmp_path / "raw").write_bytes(bytes.fromhex(KEY))
    (tmp_path / "hex").write_text(KEY + "\n")
    data = frame_of(chunk, key_file=tmp_path / "raw")
    for options in ({"key_file": tmp_path / "hex"}, {"key_env": "KV_KEY"}):
        assert decode([memoryview(data)], chunk.key, Pipeline([made(**options)]), 9).tokens == 9


def test_a_frame_whose_key_is_not_configured_is_unreadable_not_damaged() -> None:
    """So that a node with another key does not delete it."""
    chunk = make_chunk(tiny_layout(), 9)
    data = frame_of(chunk, key_env="OTHER_KEY")
    for pipeline in (Pipeline([made(key_env="KV_KEY")]), Pipeline([])):
        with pytest.raises(FrameError) as raised:
            decode([memoryview(data)], chunk.key, pipeline, 9)
        assert raised.value.reason == "unreadable"


def test_keys_rotate() -> None:
    """The first of several seals, all of them open."""
    chunk = make_chunk(tiny_layout(), 9)
    new, old = {"key_env": "OTHER_KEY"}, {"key_env": "KV_KEY"}
    before, after = frame_of(chunk, **old), frame_of(chunk, keys=[new, old])
    reads = {
        name: [_opens(data, chunk, **options) for data in (before, after)]
        for name, options in {"both": {"keys": [new, old]}, "new": new, "old": old}.items()
    }
    assert reads == {"both": [True, True], "new": [False, True], "old": [True, False]}


def _opens(data: bytes, chunk: Chunk, **options: Any) -> bool:
    try:
        decode([memoryview(data)], chunk.key, Pipeline([made(**options)]), 9)
    except FrameError as error:
        assert error.reason == "unreadable"
        return False
    return True


def test_a_seal_is_the_last_step() -> None:
    zstd = component("serdes", "zstd")
    with pytest.raises(ConfigError, match="a step that seals is the last"):
        Pipeline([made(key_env="KV_KEY"), zstd(zstd.Options())])


def test_a_payload_under_another_chunk_key_or_index_does_not_open() -> None:
    layout = tiny_layout()
    one, two = make_chunk(layout, 9, index=0), make_chunk(layout, 9, index=1)
    data = frame_of(one, key_env="KV_KEY")
    for key, moved in ((two.key, forged(data, key=two.key)), (one.key, forged(data, index=1))):
        with pytest.raises(FrameError, match="does not decode"):
            decode([memoryview(moved)], key, Pipeline([made(key_env="KV_KEY")]), 9)


def test_no_tenants_data_opens_with_anothers_derived_key() -> None:
    def ciphertext(tenant: str) -> tuple[Encrypt, bytes, bytes]:
        ns = Namespace(
            model="m",
            layout=tiny_layout(),
            tenant=tenant_digest(tenant),
            weights=unverified("test"),
        )
        context = ns.keys(range(4), 4)[0] + b"the rest"
        serde = made(key_env="KV_KEY")
        return serde, context, b"".join(serde.encode([memoryview(b"secret")], context))

    serde, mine, data = ciphertext("a")
    _, theirs, _ = ciphertext("b")
    assert serde.decode([memoryview(data)], mine, bytearray, 100) == [b"secret"]
    with pytest.raises(InvalidTag):
        serde.decode([memoryview(data)], theirs, bytearray, 100)
    cipher = AESGCM(encrypt._derived(bytes.fromhex(KEY), theirs[:16]))
    with pytest.raises(InvalidTag):  # not even with the other's associated data
        cipher.decrypt(data[:12], data[12:], mine)


def test_the_key_is_nowhere_to_be_seen() -> None:
    chunk = make_chunk(tiny_layout(), 9)
    serde = made(key_env="KV_KEY")
    data = frame_of(chunk, key_env="KV_KEY")
    for shown in (repr(serde.options), repr(serde), repr(Pipeline([serde]).steps)):
        assert KEY not in shown
        assert "KV_KEY" not in shown
    assert bytes.fromhex(KEY) not in data
    assert KEY.encode() not in data


def test_equal_chunks_do_not_look_equal() -> None:
    chunk = make_chunk(tiny_layout(), 9)
    assert len({frame_of(chunk, key_env="KV_KEY") for _ in range(5)}) == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "expected either key_file or key_env"),
        ({"keys": []}, "expected either key_file or key_env"),
        ({"keys": [{}]}, "expected either key_file or key_env"),
        ({"keys": [{"key_env": "KV_KEY"}], "key_env": "KV_KEY"}, "expected either key_file"),
        ({"keys": [{"key_env": "KV_KEY"}, {"key_env": "SHORT"}]}, "SHORT must hold 32 bytes"),
        ({"key_env": "KV_KEY", "key_file": "x"}, "expected either key_file or key_env"),
        ({"key_env": "NO_SUCH_VARIABLE"}, "the variable NO_SUCH_VARIABLE is not set"),
        ({"key_file": "/no/such/file"}, "/no/such/file cannot be read: No such file"),
        ({"key_env": "a9" * 32}, "found a key .not shown."),
        ({"keys": [{"key_file": "a9" * 32}]}, "found a key .not shown."),
        ({"keys": ["a9" * 32]}, r"found '\*\*\*'"),
        ({"key_env": "SHORT"}, "the variable SHORT must hold 32 bytes"),
    ],
)
def test_a_missing_or_wrong_key_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], says: str
) -> None:
    monkeypatch.setenv("SHORT", "abc")
    tier = {"backend": "local_cpu", "capacity": 9, "serde": [{"encrypt": options}]}
    with pytest.raises(ConfigError, match=says) as raised:
        lmcache_core.open({"tiers": [tier]})
    assert "a9a9" not in str(raised.value)
