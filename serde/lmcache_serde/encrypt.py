"""encrypt: AES-256-GCM over the payload, bound to whose it is.

    payload = nonce (12 bytes) + ciphertext + tag (16 bytes)

The frame's key, place, header and with it the namespace are associated data, so a payload that is
moved to another key, or whose header was changed, does not decrypt. The key of a namespace is
derived from the configured one (HKDF-SHA256), so no tenant's data opens with another's.

    serde: [zstd, {encrypt: {key_file: /etc/lmcache/key}}]     # or key_env: NAME_OF_A_VARIABLE

The key is 32 bytes, as raw bytes or as 64 hex digits. It is in no frame, log or error; frames name
it by a fingerprint, and one whose key is not configured here is unreadable, not damaged.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field, model_validator

from lmcache_core.serde import Buffers, BytesToBytes, ConfigError, Options, concat, split_at

_NONCE = 12
_BLOCK = 16
_NAMESPACE = 16
"""Bytes of the context that name the namespace: the chunk key begins with its digest."""


_KEYS: dict[str, bytes] = {}
"""Keys that this process was configured with, by fingerprint: what frames are decrypted with."""


class EncryptOptions(Options):
    """`key_file`: a path. Or `key_env`: the name of an environment variable.

    `key_id` is what frames record instead: the fingerprint of the key.
    """

    key_file: Path | None = Field(default=None, exclude=True)
    key_env: str | None = Field(default=None, exclude=True)
    key_id: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> EncryptOptions:
        if sum(value is not None for value in (self.key_file, self.key_env, self.key_id)) != 1:
            raise ValueError("expected either key_file or key_env")
        return self


class Encrypt(BytesToBytes):
    """Wrong key or tampering: a miss."""

    name = "encrypt"
    Options = EncryptOptions

    def __init__(self, options: Any) -> None:
        """Read the key. Raises ConfigError where there is none of 32 bytes."""
        master = _known_key(options.key_id) if options.key_id else _read_key(options)
        key_id = hashlib.blake2b(master, digest_size=8, person=b"lmcache-key-id").hexdigest()
        _KEYS[key_id] = master
        super().__init__(EncryptOptions(key_id=key_id))
        self._master = master

    def encode(self, parts: Buffers, context: bytes) -> list[memoryview]:
        nonce = os.urandom(_NONCE)
        key = _derived(self._master, context[:_NAMESPACE])
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
        key = _derived(self._master, context[:_NAMESPACE])
        nonce, sealed = split_at(parts, _NONCE)
        plain = AESGCM(key).decrypt(bytes(nonce), concat(sealed), context)
        return [memoryview(plain)]


@lru_cache(maxsize=256)
def _derived(master: bytes, namespace: bytes) -> bytes:
    """The key of a namespace, which names the tenant."""
    derive = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"lmcache-frame-1" + namespace)
    return derive.derive(master)


def _known_key(key_id: str) -> bytes:
    if key_id not in _KEYS:
        raise ConfigError(f"encrypt: the key {key_id} is not configured here")
    return _KEYS[key_id]


def _read_key(options: EncryptOptions) -> bytes:
    if options.key_env is not None:
        source = f"the variable {options.key_env}"
        data = os.environb.get(os.fsencode(options.key_env))
    else:
        source = str(options.key_file)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise ConfigError(f"encrypt: {source} cannot be read: {error.strerror}") from None
    if data is None:
        raise ConfigError(f"encrypt: {source} is not set")
    if len(data) == 32:
        return data
    try:
        key = bytes.fromhex(data.decode().strip())
    except (ValueError, UnicodeDecodeError):
        key = b""
    if len(key) != 32:
        raise ConfigError(f"encrypt: {source} must hold 32 bytes, raw or as 64 hex digits")
    return key
