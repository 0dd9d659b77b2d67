"""Forged frames: what a stranger may write, with a checksum that holds, for XXH3 is no secret."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Iterator
from typing import Any

from lmcache_core.frames import format as frame_format
from lmcache_core.frames.format import HEADER, PRELUDE, Head
from lmcache_core.kv.layout import DTYPES
from lmcache_core.plugins.registry import known

NUMBERS = (-1, 0, 1, 2, 3, 7, 127, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 39, 1 << 63, 1 << 70)
JUNK: tuple[Any, ...] = (
    *NUMBERS,
    *(None, True, False, 0.5, 1e308, float("nan"), "", "x" * 99, [], {}, [[]], [1] * 99),
    *("/dev/zero", "../../etc/passwd", "\ud800", {"a": {"b": [None]}}, [[["g0.k"]]]),
)


def read_head(data: bytes | memoryview) -> Head:
    """The fixed fields of a whole frame."""
    return Head.read([memoryview(data)], verify=False)


def read_header(data: bytes | memoryview) -> dict[str, Any]:
    """The header of a whole frame."""
    fields: dict[str, Any] = json.loads(bytes(data[HEADER : HEADER + read_head(data).length]))
    return fields


def forged(
    data: bytes, *, header: object = None, payload: bytes | None = None, **fields: Any
) -> bytes:
    """A whole frame with another header (JSON, or its bytes), another payload or other fixed
    fields (`Head`); lengths and checksum hold unless a field says otherwise."""
    head = read_head(data)
    text = data[HEADER : HEADER + head.length]
    if header is not None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = data[head.payload :] if payload is None else payload
    head = dataclasses.replace(head, length=len(text), nbytes=len(body))
    head = dataclasses.replace(head, **fields)
    prelude = PRELUDE.pack(*dataclasses.astuple(head))
    padded = text + bytes(-(HEADER + len(text)) % 64)
    return prelude + frame_format._checksum(prelude, [memoryview(padded + body)]) + padded + body


def mutants(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Frames that differ from a whole one in one field or a few: of the fixed ones, of the header,
    whose every value, list and name is reached, or in the payload."""
    rng = random.Random(seed)
    header, body = read_header(data), data[read_head(data).payload :]
    ways = [_head_changed, _header_changed, _header_changed, _payload_changed]
    for _ in range(count):
        yield rng.choice(ways)(data, header, body, rng)


def _head_changed(data: bytes, header: Any, body: bytes, rng: random.Random) -> bytes:
    name = rng.choice(["version", "flags", "length", "tokens", "index", "nbytes", "zero", "key"])
    if name == "key":
        return forged(data, key=rng.randbytes(32))
    bits = {"version": 16, "flags": 16, "nbytes": 64}.get(name, 32)
    near = int(getattr(read_head(data), name)) + rng.choice([-1, 1, 64, 256])
    value = rng.choice([near, rng.choice(NUMBERS), rng.getrandbits(bits)])
    fields: dict[str, Any] = {name: value % (1 << bits)}
    return forged(data, **fields)


def _header_changed(data: bytes, header: Any, body: bytes, rng: random.Random) -> bytes:
    changed = copy.deepcopy(header)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        _change_one(changed, rng)
    if rng.random() < 0.02:  # not even JSON
        text = bytearray(json.dumps(changed).encode())
        text[rng.randrange(len(text))] = rng.randrange(256)
        return forged(data, header=bytes(text))
    return forged(data, header=changed)


def _change_one(header: Any, rng: random.Random) -> None:
    """One value, entry or name, anywhere in it."""
    holder = header
    while True:
        places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not places:
            return
        where = rng.choice(places)
        if not isinstance(holder[where], dict | list) or not holder[where] or rng.random() < 0.15:
            break
        holder = holder[where]
    way = rng.randrange(6)
    if way == 0:
        del holder[where]
    elif way == 1 and isinstance(holder, list):
        holder.insert(where, copy.deepcopy(rng.choice(holder)))
    elif way == 2 and isinstance(holder, list):
        holder[:] = holder * rng.choice([2, 3, 40])
    elif way == 3 and isinstance(holder, dict):
        holder[rng.choice(["key_file", "key_env", "level", "group", "exact_layers", "x"])] = (
            copy.deepcopy(rng.choice(JUNK))
        )
    else:
        holder[where] = _another(holder[where], rng)


def _another(value: Any, rng: random.Random) -> Any:
    """A value of the same kind most of the time."""
    if type(value) is int and rng.random() < 0.7:
        return rng.choice([value + 1, value - 1, value * 2, 1 << rng.randrange(40)])
    if isinstance(value, str) and rng.random() < 0.7:
        return rng.choice([*known("serdes"), *DTYPES, value + ".codes", value[:-1]])
    return copy.deepcopy(rng.choice(JUNK))


def _payload_changed(data: bytes, header: Any, body: bytes, rng: random.Random) -> bytes:
    changed = bytearray(body or b"\0")
    start, end = sorted((rng.randrange(len(changed)), rng.randrange(len(changed) + 1)))
    way = rng.randrange(8)
    if way < 4:
        for _ in range(rng.randint(1, 6)):
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
    elif way == 4:
        run = (bytes(end - start), b"\xff" * (end - start), rng.randbytes(end - start))
        changed[start:end] = rng.choice(run)
    elif way == 5:
        del changed[start:end]
    elif way == 6:
        changed[start:start] = changed[start:end] or b"\0"
    else:
        changed = bytearray(rng.randbytes(rng.randrange(300)))
    return forged(data, payload=bytes(changed))
