"""encrypt: AES-256-GCM over the payload, bound to whose it is.

    payload = nonce (12 bytes) + ciphertext + tag (16 bytes)

The frame's key, tokens, index and header, with it pipeline, shapes and namespace, are associated
data, so a payload that is moved to another key, or whose header was changed, does not open. The key
of a namespace is derived from the configured one (HKDF-SHA256), so no tenant's data opens with
another's.

    serde: [zstd, {encrypt: {key_file: /etc/lmcache/key}}]     # or key_env: NAME_OF_A_VARIABLE
    serde: [zstd, {encrypt: {keys: [{key_file: new}, {key_file: old}]}}]

A key is 32 bytes, as raw bytes or as 64 hex digits. With several the first seals and all open:
rotation. Keys are in no frame, log or error; frames name theirs by a fingerprint, and one whose key
is not configured here is unreadable, not damaged. A tier that seals takes nothing that is not
sealed.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field, model_validator

from lmcache_core.serde import (
    Buffers,
    BytesToBytes,
    ConfigError,
    FrameError,
    FrameOptions,
    Options,
    concat,
    split_at,
)

_NONCE = 12
_BLOCK = 16
_NAMESPACE = 16
"""Bytes of the context that name the namespace: the chunk key begins with its digest."""
_KEY_FILE_BYTES = 1024
_LOOKS_LIKE_A_KEY = re.compile("[0-9a-fA-F]{64}")


class KeySource(Options):
    """`key_file`: a path. Or `key_env`: the name of an environment variable."""

    key_file: Path | None = Field(default=None, repr=False)
    key_env: str | None = Field(default=None, repr=False)


class EncryptOptions(KeySource):
    """`key_file` or `key_env` for one key, or `keys`: a list of these, the newest first."""

    keys: tuple[KeySource, ...] = Field(default=(), max_length=64)

    @property
    def sources(self) -> tuple[KeySource, ...]:
        """Where the keys are, the one to seal with first."""
        return self.keys or (self,)

    @model_validator(mode="after")
    def _one_source_each(self) -> EncryptOptions:
        named = [(each.key_file is None) != (each.key_env is None) for each in self.sources]
        both = self.keys and (self.key_file, self.key_env) != (None, None)
        if both or not all(named):
            raise ValueError("expected either key_file or key_env, or as keys a list of these")
        return self


class KeyId(FrameOptions):
    """`key_id`: the fingerprint of the key, which tells nothing of it."""

    key_id: int = Field(ge=0, lt=1 << 64)


class Encrypt(BytesToBytes):
    """Wrong key or tampering: a miss."""

    name = "encrypt"
    Options = EncryptOptions
    Recorded = KeyId
    known_size = True
    seals = True

    def __init__(self, options: EncryptOptions) -> None:
        """Read the keys. Raises ConfigError where one is not 32 bytes."""
        super().__init__(options)
        self._keys = {_fingerprint(key): key for key in map(_read_key, options.sources)}
        self._key_id = next(iter(self._keys))

    def frame_options(self) -> KeyId:
        """The fingerprint of the key that this one uses."""
        return KeyId(key_id=self._key_id)

    def for_frame(self, recorded: FrameOptions) -> Self:
        """The same keys, of which the frame's is used."""
        key_id = int(recorded.key_id)  # type: ignore[attr-defined]
        if key_id not in self._keys:
            raise FrameError(f"the key {key_id:016x} is not configured here", "unreadable")
        other = copy.copy(self)
        other._key_id = key_id
        return other

    def encode(self, parts: Buffers, context: bytes) -> list[memoryview]:
        nonce = os.urandom(_NONCE)
        key = _derived(self._keys[self._key_id], context[:_NAMESPACE])
        cipher = Cipher(AES(key), GCM(nonce)).encryptor()
        cipher.authenticate_additional_data(context)
        size = sum(part.nbytes for part in parts)
        out = memoryview(bytearray(size + _BLOCK))  # the library asks for a block's room
        done = 0
        for part in parts:
            done += cipher.update_into(part, out[done:])
        return [memoryview(nonce), out[:done], memoryview(cipher.finalize() + cipher.tag)]

    def decode(
        self,
        parts: Buffers,
        context: bytes,
        allocate: Callable[[int], memoryview],
        limit: int,
    ) -> list[memoryview]:
        key = _derived(self._keys[self._key_id], context[:_NAMESPACE])
        nonce, sealed = split_at(parts, _NONCE)
        plain = AESGCM(key).decrypt(bytes(nonce), concat(sealed), context)
        return [memoryview(plain)]


@lru_cache(maxsize=256)
def _derived(master: bytes, namespace: bytes) -> bytes:
    """The key of a namespace, which names the tenant."""
    derive = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"lmcache-frame-1" + namespace)
    return derive.derive(master)


def _fingerprint(key: bytes) -> int:
    digest = hashlib.blake2b(key, digest_size=8, person=b"lmcache-key-id").digest()
    return int.from_bytes(digest, "big")


def _read_key(source: KeySource) -> bytes:
    if _LOOKS_LIKE_A_KEY.fullmatch(source.key_env or str(source.key_file)):
        raise ConfigError(
            "encrypt: expected the name of a file or variable; found a key (not shown)"
        )
    if source.key_env is not None:
        where = f"the variable {source.key_env}"
        data = os.environb.get(os.fsencode(source.key_env))
        if data is None:
            raise ConfigError(f"encrypt: {where} is not set")
    else:
        where = str(source.key_file)
        data = _read_file(where)
    if len(data) == 32:
        return data
    try:
        key = bytes.fromhex(data.decode().strip())
    except (ValueError, UnicodeDecodeError):
        key = b""
    if len(key) != 32:
        raise ConfigError(f"encrypt: {where} must hold 32 bytes, raw or as 64 hex digits")
    return key


def _read_file(path: str) -> bytes:
    """A key file's bytes; no more of a larger one than shows that it is none."""
    try:
        with open(path, "rb") as file:
            return file.read(_KEY_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"encrypt: {path} cannot be read: {error.strerror}") from None
