"""Namespace: everything besides the tokens that must match for KV to be reusable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmcache_core.kv.keys import ChunkKey, TokenIds, token_bytes
from lmcache_core.kv.layout import KVLayout
from lmcache_core.kv.weights import Weights, unverified

FRAME_VERSION = 1
"""Version of the frame format; part of every Namespace, so that formats never meet."""


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
    weights: Weights
    """What `weights_digest(model)` gives, or `unverified(name)`: one name with other weights
    shares nothing."""
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

    @model_validator(mode="before")
    @classmethod
    def _says_weights(cls, fields: Any) -> Any:
        weights = fields.get("weights") if isinstance(fields, Mapping) else None
        if isinstance(weights, Weights | Mapping):
            return fields
        if isinstance(weights, str) and weights:  # somebody's word, and shown as such
            return {**fields, "weights": unverified(weights)}
        raise ValueError(
            "weights: expected weights_digest(model), since KV of other weights must not be found "
            'under this namespace, or unverified("name") if you vouch for a name; '
            f"got {'nothing' if weights is None else repr(weights)}"
        )

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
        data = memoryview(token_bytes(token_ids))
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
