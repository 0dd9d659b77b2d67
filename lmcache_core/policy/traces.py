"""Traces: the sequences that requests asked for, one a line.

    {"hash_ids": [0, 5, 9], ...}        Mooncake: a number for each block of a prompt; equal numbers
                                        stand for equal blocks behind equal prefixes
    {"token_ids": [1, 15043, ...], ...} a log of prompts, cut into chunks of `chunk_size` tokens
    {"keys": ["9f3c...", ...], ...}     our own events: a request's chunk keys, as text

Other members of a line are passed over, but for "tenant", which sets the keys of whoever it names
apart; blank lines are, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lmcache_core.errors import ConfigError
from lmcache_core.kv.keys import ChunkKey, token_bytes

Sequences = Iterator[list[ChunkKey]]


def read(path: str | Path, chunk_size: int = 256) -> Sequences:
    """The sequence of each request, root first. Raises ConfigError, with the line's number, for
    what is none of the above."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _sequence(json.loads(line), chunk_size)
                except (ValueError, TypeError, AttributeError, OverflowError) as error:
                    raise ConfigError(f"{path}, line {number}: {error}") from error


def _sequence(line: Any, chunk_size: int) -> list[ChunkKey]:
    if not isinstance(line, dict):
        raise ValueError("expected an object")
    owner = blake2b(str(line.get("tenant", "")).encode(), digest_size=16).digest()
    if "keys" in line:
        return [ChunkKey.parse(text) for text in _list(line["keys"])]
    if "token_ids" in line:
        return _of_tokens(owner, token_bytes(_list(line["token_ids"])), 4 * chunk_size)
    if "hash_ids" in line:
        return _of_numbers(owner, _list(line["hash_ids"]))
    raise ValueError('expected "hash_ids", "token_ids" or "keys"')


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, not {value!r:.40}")
    return value


def _of_tokens(owner: bytes, data: bytes, step: int) -> list[ChunkKey]:
    keys, parent = [], owner
    for begin in range(0, len(data) - step + 1, step):
        parent = blake2b(parent + data[begin : begin + step], digest_size=16).digest()
        keys.append(ChunkKey(owner + parent))
    return keys


def _of_numbers(owner: bytes, numbers: Iterable[int]) -> list[ChunkKey]:
    hashes = (blake2b(number.to_bytes(8, "little"), digest_size=16) for number in numbers)
    return [ChunkKey(owner + each.digest()) for each in hashes]
