"""What a model's config says of its KV: the part of an identity that no weight tells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_VOLATILE = frozenset(
    ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "_commit_hash")
)
"""Keys of a config that say nothing of what the KV will be: names, versions, what tensors tell."""
_BY_LENGTH = frozenset(("dynamic", "longrope"))
"""Rotary embeddings whose frequencies depend on how long the prompt is."""


def config_digest(fields: Mapping[str, Any]) -> str:
    """32 hex digits for a model's config, as far as it says what the KV will be."""
    kept = {key: value for key, value in fields.items() if key not in _VOLATILE}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def rope_types(fields: Mapping[str, Any]) -> set[str]:
    """Every kind of rotary embedding that a model's config names, however it nests them."""
    return {
        str(value)
        for key, value in _walk(fields)
        if key in ("rope_type", "type") and isinstance(value, str)
    }


def depends_on_length(fields: Mapping[str, Any]) -> bool:
    """Whether the positions of a prompt's first tokens change with its length: its KV then stands
    for one length only."""
    return bool(rope_types(fields) & _BY_LENGTH)


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    todo: list[Any] = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, Mapping):
            yield from ((str(key), each) for key, each in item.items())
            todo += item.values()
        elif isinstance(item, Sequence) and not isinstance(item, str | bytes):
            todo += item
