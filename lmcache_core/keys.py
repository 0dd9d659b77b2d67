"""Who a piece of KV belongs to: Namespace, ChunkKey and the chained hash.

    namespace digest = BLAKE2b-128(canonical JSON of the Namespace)
    h_0 = BLAKE2b-128(namespace digest || tokens_0)
    h_i = BLAKE2b-128(h_(i-1)          || tokens_i)

Tokens are little-endian uint32. A chunk's hash therefore stands for every token before it as well,
which is what its keys and values depend on. 128 bits of a cryptographic hash, the same in every
process, machine and Python.
"""

from __future__ import annotations

import array
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from lmcache_core.layout import KVLayout

FRAME_VERSION = 1
"""Version of the frame format; part of every Namespace, so that formats never meet."""

TokenIds = Sequence[int] | np.ndarray | torch.Tensor


class ChunkKey(bytes):
    """32 bytes: namespace digest (16), chained hash (16). Its text is 64 hex digits.

    A `bytes`, so that dictionaries hash it natively and an index entry stays small.
    """

    __slots__ = ()

    def __new__(cls, value: bytes) -> ChunkKey:
        if len(value) != 32:
            raise ValueError(f"a chunk key has 32 bytes, not {len(value)}")
        return super().__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> ChunkKey:
        """The key whose `str()` is `text`. Raises ValueError for anything else."""
        key = cls(bytes.fromhex(text))
        if str(key) != text:
            raise ValueError(f"not the text of a chunk key: {text!r}")
        return key

    @property
    def namespace(self) -> bytes:
        """The namespace digest, 16 bytes."""
        return self[:16]

    @property
    def hash(self) -> bytes:
        """The chained hash of all tokens up to this chunk's end, 16 bytes."""
        return self[16:]

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"ChunkKey({self.hex()})"


def tenant_digest(salt: str) -> str:
    """What a Namespace holds in place of a tenant's salt, which may be a secret."""
    return hashlib.blake2b(salt.encode(), digest_size=16, person=b"lmcache-tenant").hexdigest()


class Namespace(BaseModel):
    """Everything besides the tokens that must match for KV to be reusable.

    Two namespaces that differ in any field share nothing. `document` is stored in every frame, so
    that a person can ask what a key belongs to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    """The model's name, any text."""
    layout: KVLayout
    weights: str = ""
    """Fingerprint of the weights: one name with other weights shares nothing."""
    revision: str = ""
    rank: int = Field(default=0, ge=0)
    """This worker's place among `world` workers that each hold a part of the KV."""
    world: int = Field(default=1, ge=1)
    positions: str = ""
    """Position scheme (RoPE base, scaling, ...) as text."""
    memory_format: str = "canonical"
    """Names the packing where the bytes are an engine's own."""
    adapter: str = ""
    """LoRA or other adapter: name and fingerprint."""
    tenant: str = Field(default="", pattern=r"^([0-9a-f]{32})?$")
    """`tenant_digest(salt)`, or empty."""
    extra: dict[str, str] = Field(default_factory=dict)
    """Components that plugins add."""

    @cached_property
    def document(self) -> bytes:
        """Canonical JSON: keys sorted, ASCII, no spaces."""
        fields = {**self.model_dump(mode="json"), "frame_version": FRAME_VERSION}
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for the document."""
        return hashlib.blake2b(self.document, digest_size=16, person=b"lmcache-names-1").digest()

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> Namespace:
        """A validated copy. Pydantic's own would take the cached digest along."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**fields, **(update or {})})

    @classmethod
    def from_document(cls, document: bytes) -> Namespace:
        """The namespace that `document` describes. Raises ValueError for anything else."""
        fields = json.loads(document)
        if not isinstance(fields, dict) or fields.pop("frame_version", None) != FRAME_VERSION:
            raise ValueError("not a namespace document of this version")
        return cls.model_validate(fields)

    def keys(self, token_ids: TokenIds, chunk_size: int) -> list[ChunkKey]:
        """One key for each full chunk of `chunk_size` tokens; a shorter rest has none.

        `token_ids`: integers in [0, 2**32), 1-D. Raises ValueError for others.
        """
        data = memoryview(_token_bytes(token_ids))
        step = 4 * chunk_size
        parts = (data[i : i + step] for i in range(0, len(data) - step + 1, step))
        return self._chain(parts)

    def keys_from_hashes(self, hashes: Iterable[bytes]) -> list[ChunkKey]:
        """Keys for an engine that already hashes its blocks in a chain (vLLM's block hashes).

        Each hash must stand for the whole prefix up to its chunk's end; one hash, one key.
        """
        digest = self.digest
        return [
            ChunkKey(
                digest + hashlib.blake2b(h, digest_size=16, person=b"lmcache-engine-1").digest()
            )
            for h in hashes
        ]

    def _chain(self, parts: Iterable[memoryview]) -> list[ChunkKey]:
        digest = parent = self.digest
        keys: list[ChunkKey] = []
        for part in parts:
            state = hashlib.blake2b(parent, digest_size=16, person=b"lmcache-chunk-1")
            state.update(part)
            parent = state.digest()
            keys.append(ChunkKey(digest + parent))
        return keys


def _token_bytes(token_ids: TokenIds) -> bytes:
    if isinstance(token_ids, torch.Tensor):
        token_ids = token_ids.detach().cpu().numpy()
    if isinstance(token_ids, np.ndarray):
        return _array_bytes(token_ids)
    try:
        ids = array.array("I", token_ids)  # twice as fast as numpy on a list
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids are integers in [0, 2**32): {error}") from None
    if ids.itemsize != 4 or sys.byteorder != "little":
        return np.asarray(ids).astype("<u4").tobytes()
    return ids.tobytes()


def _array_bytes(ids: np.ndarray) -> bytes:
    if ids.ndim != 1:
        raise ValueError(f"token ids are one sequence; got shape {ids.shape}")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token ids are integers; got {ids.dtype}")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 2**32):
        raise ValueError("token ids are integers in [0, 2**32)")
    return ids.astype("<u4").tobytes()
