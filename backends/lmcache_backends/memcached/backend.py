"""memcached: frames as items, on one server or spread over several.

    <prefix>:<64 hex digits>                        flags 0: a whole frame
                                                    flags 1: a head, "<version> <pieces> <bytes>"
    <prefix>:<64 hex digits>:<version>:<number>     a piece of a frame that is too large for an item

Pieces are written before their head, which is what makes a chunk visible; the version is random,
so pieces of different writes never meet, and a set that misses one is no chunk. The largest item
is what the server's settings say.

pymemcache connects; commands of memcached's meta protocol (1.6) follow each other on its sockets
without waiting, values are read into their destination and written from where they lie. What
leaves when memory is full is the server's affair; a `ttl` is ours.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from pydantic import field_validator

from lmcache_backends._net.batch import LARGE, Assembly
from lmcache_backends._net.connection import Buffer, Connection
from lmcache_backends._net.options import Address, Expiry, Login, Prefix, SecretUrl, Tls
from lmcache_backends.memcached.servers import (
    Dial,
    Servers,
    one_line,
    shares,
    value_follows,
)
from lmcache_core.backend import (
    Buffers,
    ChunkKey,
    StorageBackend,
    StorageError,
    Stored,
    Transfer,
    nbytes_of,
)

_AHEAD_BYTES = 512 << 10
_MONTH = 30 * 24 * 3600
"""Seconds from which on memcached takes an expiry for a date."""
_END = b"\r\n"
_HEAD = re.compile(rb"([0-9a-f]{16}) ([0-9]{1,6}) ([0-9]{1,12})")
_HEAD_FLAG = b"f1"
_LARGEST_HEAD = 100
"""Bytes."""


class MemcachedOptions(Expiry):
    """`url`: memcached://[user[:password]@]host[:port][,host[:port]...], or
    memcached:///path/of/a/socket. `password_env`: a variable that holds the password."""

    url: SecretUrl
    prefix: Prefix = "lmcache"
    password_env: str | None = None
    tls: Tls | None = None

    @field_validator("url")
    @classmethod
    def _readable(cls, url: SecretUrl) -> SecretUrl:
        parse_url(url.get_secret_value())
        return url

    def identity(self) -> str:
        """The servers and the prefix, without who we are to them."""
        hosts = sorted(parse_url(self.url.get_secret_value()).hosts)
        return f"{','.join(map(str, hosts))} {self.prefix}"


class Url(NamedTuple):
    """What a url says."""

    hosts: tuple[Address, ...]
    login: Login


def parse_url(text: str) -> Url:
    """Raises ValueError, which never quotes the url: it may hold a password."""
    try:
        parts = urlsplit(text)
        if not text.startswith("memcached://") or parts.query or parts.fragment:
            raise ValueError
        login, place = Login.parse(parts.netloc)
        if place and parts.path in ("", "/"):
            hosts = tuple(Address.parse(host, 11211) for host in place.split(","))
        elif parts.path and not place:
            hosts = (Address(parts.path, 0),)
        else:
            raise ValueError
    except ValueError:
        raise ValueError(
            "expected memcached://[user[:password]@]host[:port][,host...] or memcached:///path"
        ) from None
    return Url(hosts, login)


class MemcachedBackend(StorageBackend):
    """Frames as items of memcached servers."""

    Options = MemcachedOptions
    schemes = ("memcached",)

    def __init__(self, options: MemcachedOptions) -> None:
        self._prefix = options.prefix.encode() + b":"
        self._refresh = options.refresh
        self._ttl = options.ttl
        url = parse_url(options.url.get_secret_value())
        login = url.login.with_password_of(options.password_env)
        tls = None if options.tls is None else options.tls.context()
        self._servers = Servers(url.hosts, Dial(login, tls))

    def __repr__(self) -> str:
        return f"<MemcachedBackend: {self._servers!r}>"

    def contains(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        found = [False] * len(keys)
        for i, line in self._lines(b"mg %b", keys, transfer):
            found[i] = line.startswith(b"HD")
        return found

    def get(self, keys: Sequence[ChunkKey], transfer: Transfer) -> Iterator[tuple[int, Buffers]]:
        names = self._names(keys)
        heads: dict[int, Head | None] = {}

        def value(connection: Connection, i: int, line: bytes) -> Buffers | None:
            if line.startswith(b"EN"):
                return None
            nbytes, flags = value_follows(connection, line)
            fits = nbytes <= transfer.limit
            buffer = transfer.allocate(nbytes if fits else 0)
            connection.skip(0 if fits else nbytes)
            connection.read_into(buffer)
            connection.expect(_END)
            if _HEAD_FLAG not in flags:
                return [buffer]
            heads[i] = self._head(connection, buffer, transfer)
            return None

        request = [b"mg %b v f\r\n" % name for name in names]
        places = self._servers.of(keys)
        for i, parts in self._servers.batch(
            shares(places), lambda i: [request[i]], value, transfer, _AHEAD_BYTES
        ):
            if parts is not None:
                yield i, parts
            del parts
        whole = {i: head for i, head in heads.items() if head is not None}
        torn = set(heads) - set(whole)
        yield from self._joined(names, places, whole, transfer, torn)
        if torn:
            self.delete([keys[i] for i in torn], transfer)

    def _joined(
        self,
        names: Sequence[bytes],
        places: Sequence[Address],
        heads: dict[int, Head],
        transfer: Transfer,
        torn: set[int],
    ) -> Iterator[tuple[int, Buffers]]:
        """Frames from their pieces; those that lack one are noted as `torn`."""
        numbers = _pieces(heads)
        spans = [(i, *heads[i].span(number)) for i, number in numbers]
        values = Assembly({i: head.nbytes for i, head in heads.items()}, spans, transfer)

        def piece(connection: Connection, n: int, line: bytes) -> None:
            if line.startswith(b"EN"):
                return values.miss(n)
            nbytes, _ = value_follows(connection, line)
            _, begin, end = spans[n]
            if nbytes == end - begin:
                connection.read_into(values.target(n))
            else:
                values.miss(n)
                connection.skip(nbytes)
            connection.expect(_END)

        def request(n: int) -> list[Buffer]:
            i, number = numbers[n]
            return [b"mg %b v\r\n" % heads[i].name(names[i], number)]

        servers = shares([places[i] for i, _ in numbers])
        for n, _ in self._servers.batch(servers, request, piece, transfer, LARGE):
            whole = values.take(n)
            if whole is not None:
                yield whole[0], [whole[1]]
            del whole
        torn |= values.torn

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> int:
        keys = [key for key, _ in frames]
        names, places = self._names(keys), self._servers.of(keys)
        sizes = [nbytes_of(parts) for _, parts in frames]
        limits = {place: self._servers.limit(place, transfer) for place in set(places)}
        heads = {
            i: Head.fresh(size, limits[place])
            for i, (size, place) in enumerate(zip(sizes, places, strict=True))
            if size > limits[place] > 0
        }
        there = self.contains([keys[i] for i in heads], transfer)  # before their pieces are sent
        stored = {i for i, known in zip(heads, there, strict=True) if known}
        heads = {i: head for i, head in heads.items() if i not in stored}
        refused = self._put_pieces(frames, names, places, heads, transfer)
        refused |= self._torn(names, places, heads, transfer)

        def value(i: int) -> list[Buffer]:
            if i in heads:
                head = heads[i].text
                return [self._set(names[i], len(head), b"F1 ME"), head, _END]
            return [self._set(names[i], sizes[i], b"ME"), *frames[i][1], _END]

        todo = [i for i in range(len(frames)) if i not in refused | stored]
        unused = sorted(refused)
        servers = shares([places[i] for i in todo])
        answers = self._servers.batch(servers, lambda n: value(todo[n]), one_line, transfer, LARGE)
        for n, line in answers:
            if line.startswith((b"HD", b"NS")):
                stored.add(todo[n])
            if line.startswith(b"NS") and todo[n] in heads:
                unused.append(todo[n])
        self._each_piece(b"md %b", names, places, {i: heads[i] for i in unused}, transfer)
        return next((i for i in range(len(frames)) if i not in stored), len(frames))

    def _put_pieces(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        names: Sequence[bytes],
        places: Sequence[Address],
        heads: dict[int, Head],
        transfer: Transfer,
    ) -> set[int]:
        """Write the pieces of frames that are too large; which of these were not taken."""
        pieces = _pieces(heads)

        def request(n: int) -> list[Buffer]:
            i, number = pieces[n]
            begin, end = heads[i].span(number)
            name = heads[i].name(names[i], number)
            return [self._set(name, end - begin, b""), *_cut(frames[i][1], begin, end), _END]

        left = {i: head.pieces for i, head in heads.items()}
        servers = shares([places[i] for i, _ in pieces])
        for n, line in self._servers.batch(servers, request, one_line, transfer, LARGE):
            left[pieces[n][0]] -= line.startswith(b"HD")
        return {i for i, count in left.items() if count}

    def _torn(
        self,
        names: Sequence[bytes],
        places: Sequence[Address],
        heads: dict[int, Head],
        transfer: Transfer,
    ) -> set[int]:
        """Which of these frames miss a piece: where large items have little room they displace
        each other as they are written."""
        left = {i: head.pieces for i, head in heads.items()}
        for n, line in self._each_piece(b"mg %b", names, places, heads, transfer):
            left[n] -= line.startswith(b"HD")
        return {i for i, count in left.items() if count}

    def delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        names, places = self._names(keys), self._servers.of(keys)
        heads = self._heads(names, places, b"", transfer)
        for _ in self._lines(b"md %b", keys, transfer):
            pass
        self._each_piece(b"md %b", names, places, heads, transfer)

    def _each_piece(
        self,
        command: bytes,
        names: Sequence[bytes],
        places: Sequence[Address],
        heads: dict[int, Head],
        transfer: Transfer,
    ) -> list[tuple[int, bytes]]:
        """(index of the frame, answer) of a command for every piece of some frames."""
        pieces = _pieces(heads)
        lines = [command % heads[i].name(names[i], number) + _END for i, number in pieces]
        servers = [places[i] for i, _ in pieces]
        return [(pieces[n][0], line) for n, line in self._servers.ask(servers, lines, transfer)]

    def _heads(
        self,
        names: Sequence[bytes],
        places: Sequence[Address],
        flags: bytes,
        transfer: Transfer,
        sizes: dict[int, int] | None = None,
    ) -> dict[int, Head]:
        """Those of `names` that are heads; `flags` are given to memcached with the question."""
        ask = [b"mg %b s f %b\r\n" % (name, flags) for name in names]
        marked: list[int] = []
        for i, line in self._servers.ask(places, ask, transfer):
            if line.startswith(b"HD"):
                words = line.split()
                if sizes is not None:
                    sizes[i] = int(next(word[1:] for word in words if word.startswith(b"s")))
                if _HEAD_FLAG in words:
                    marked.append(i)
        heads: dict[int, Head] = {}

        def text(connection: Connection, n: int, line: bytes) -> None:
            if line.startswith(b"EN"):
                return
            nbytes, flags = value_follows(connection, line)
            is_head = _HEAD_FLAG in flags and nbytes <= _LARGEST_HEAD
            buffer = memoryview(bytearray(nbytes if is_head else 0))
            connection.skip(nbytes - buffer.nbytes)
            connection.read_into(buffer)
            connection.expect(_END)
            head = self._head(connection, buffer, transfer)
            if head is not None:
                heads[marked[n]] = head

        servers = shares([places[i] for i in marked])
        read = [b"mg %b v f\r\n" % names[i] for i in marked]
        for _ in self._servers.batch(servers, lambda n: [read[n]], text, transfer):
            pass
        return heads

    def _head(self, connection: Connection, text: memoryview, transfer: Transfer) -> Head | None:
        """A head as it came from a server; None for what is none, such as one of more pieces than
        its frame has there."""
        head = _parse_head(bytes(text))
        if head is None or head.nbytes > transfer.limit:
            return None
        largest = self._servers.limit(connection.address, transfer)
        return head if head.pieces <= -(-head.nbytes // max(1, largest)) else None

    def touch(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        keys = list(reversed(keys))  # the root last, so that it was used last
        flags = self._expiry() if self._refresh else b""
        names, places = self._names(keys), self._servers.of(keys)
        heads = self._heads(names, places, flags, transfer)
        self._each_piece(b"mg %b " + flags, names, places, heads, transfer)

    def scan(self, transfer: Transfer) -> Iterator[Stored]:
        for address in self._servers.all:
            names = self._dump(address, transfer)
            places = [address] * len(names)
            sizes: dict[int, int] = {}
            heads = self._heads(names, places, b"", transfer, sizes)
            for i, nbytes in sizes.items():
                key = ChunkKey.parse(names[i][len(self._prefix) :].decode())
                yield Stored(key, heads[i].nbytes if i in heads else nbytes)

    def _dump(self, address: Address, transfer: Transfer) -> list[bytes]:
        """The names of our chunks on one server, by its hash table: a walk along its lists misses
        what moves from one to another meanwhile."""
        pattern = re.compile(b"key=(" + re.escape(self._prefix) + b"[0-9a-f]{64}) ")
        names: list[bytes] = []
        with self._servers.pool.taken(address, transfer) as connection:
            connection.send([b"lru_crawler metadump hash\r\n"])
            while not (line := connection.line(b"\n")).startswith(b"END"):
                if not line.startswith(b"key="):
                    raise StorageError(
                        f"{address}: no list of keys: {line.decode(errors='replace')}"
                    )
                found = pattern.match(line.replace(b"%3A", b":"))
                if found:
                    names.append(found[1])
        return names

    def ping(self, transfer: Transfer) -> None:
        self._servers.ping(transfer)

    def close(self) -> None:
        self._servers.close()

    def _names(self, keys: Sequence[ChunkKey]) -> list[bytes]:
        return [self._prefix + str(key).encode() for key in keys]

    def _expiry(self) -> bytes:
        """The flag that says when an item ends: in whole seconds, or at a date."""
        if self._ttl is None:
            return b""
        seconds = math.ceil(self._ttl)
        return b"T%d" % (seconds if seconds <= _MONTH else time.time() + seconds)

    def _set(self, name: bytes, nbytes: int, flags: bytes) -> bytes:
        return b"ms %b %d %b %b\r\n" % (name, nbytes, flags, self._expiry())

    def _lines(
        self, command: bytes, keys: Sequence[ChunkKey], transfer: Transfer
    ) -> Iterator[tuple[int, bytes]]:
        """(index, answer) of a command whose answer is a line."""
        lines = [command % name + _END for name in self._names(keys)]
        return self._servers.ask(self._servers.of(keys), lines, transfer)


class Head(NamedTuple):
    """What the head of a frame in pieces says."""

    version: bytes
    pieces: int
    nbytes: int

    @classmethod
    def fresh(cls, nbytes: int, limit: int) -> Head:
        """For a frame of `nbytes` bytes where an item may have `limit`."""
        return cls(secrets.token_hex(8).encode(), -(-nbytes // limit), nbytes)

    @property
    def text(self) -> bytes:
        """As it is stored."""
        return b"%b %d %d" % self

    def name(self, frame: bytes, number: int) -> bytes:
        """Of a piece of the frame with this name."""
        return b"%b:%b:%d" % (frame, self.version, number)

    def span(self, number: int) -> tuple[int, int]:
        """The bytes that a piece holds: all the same number, but for the last."""
        size = -(-self.nbytes // self.pieces)
        return number * size, min(self.nbytes, (number + 1) * size)


def _pieces(heads: dict[int, Head]) -> list[tuple[int, int]]:
    """Which frame, and which number in it, for every piece of these."""
    return [(i, number) for i, head in heads.items() for number in range(head.pieces)]


def _cut(parts: Buffers, begin: int, end: int) -> Iterator[memoryview]:
    """The bytes from `begin` to `end` of buffers that follow each other."""
    at = 0
    for part in parts:
        first, last = max(begin - at, 0), min(end - at, part.nbytes)
        if first < last:
            yield part[first:last]
        at += part.nbytes


def _parse_head(text: bytes) -> Head | None:
    """None for what is no head."""
    found = _HEAD.fullmatch(text)
    if not found:
        return None
    head = Head(found[1], int(found[2]), int(found[3]))
    return head if 0 < head.pieces <= head.nbytes else None
