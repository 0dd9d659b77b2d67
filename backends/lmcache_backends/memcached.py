"""memcached: one server or several, each chunk on the one that rendezvous hashing gives.

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

import contextlib
import hashlib
import logging
import math
import re
import secrets
import ssl
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import SecretStr, model_validator
from pymemcache.client.base import Client

from lmcache_backends._options import Address, Expiry, Login, Prefix, Tls, from_environment
from lmcache_backends._wire import Buffer, Lane, Pool, Refused, Wire
from lmcache_core import (
    Allocate,
    ChunkKey,
    ConfigError,
    Parts,
    StorageBackend,
    StorageError,
    Stored,
    Workers,
)

log = logging.getLogger("lmcache_core")
T = TypeVar("T")

REST_SECONDS = 2.0
"""How long a server that failed is left alone, while others serve."""
_ITEM_OVERHEAD = 512
"""Bytes of an item that its key, its header and the slab's own take, at most."""
_AHEAD_BYTES = 512 << 10
_FEW = 2
_MANY = 4096
_MONTH = 30 * 24 * 3600
"""Seconds from which on memcached takes an expiry for a date."""
_OPEN_SECONDS = 1.0
_SCAN_SECONDS = 10.0
_END = b"\r\n"
_HEAD = re.compile(rb"([0-9a-f]{16}) ([0-9]{1,6}) ([0-9]{1,12})")
_HEAD_FLAG = b"f1"


class MemcachedOptions(Expiry):
    """`url`: memcached://[user[:password]@]host[:port][,host[:port]...], or
    memcached:///path/of/a/socket. `password_env`: a variable that holds the password."""

    url: SecretStr
    prefix: Prefix = "lmcache"
    password_env: str | None = None
    tls: Tls | None = None

    @model_validator(mode="after")
    def _url_is_one(self) -> MemcachedOptions:
        parse_url(self.url.get_secret_value())
        return self

    def identity(self) -> str:
        """Two tiers of equal identity would be one store."""
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
        if parts.scheme != "memcached" or parts.query or parts.fragment:
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


class Server(Wire):
    """A connection, and what the server behind it takes."""

    limit: int
    """Bytes of the largest value."""


class MemcachedBackend(StorageBackend):
    """Frames as items of memcached servers."""

    Options = MemcachedOptions

    def __init__(self, options: MemcachedOptions) -> None:
        self._prefix = options.prefix.encode() + b":"
        self._refresh = options.refresh
        self._ttl = options.ttl
        url = parse_url(options.url.get_secret_value())
        self._servers = _Servers(url.hosts)
        self._pool = Pool(_Dial(options, url))
        try:
            self.ping(_OPEN_SECONDS)
        except Refused as error:
            raise ConfigError(f"url: {error}") from None
        except Exception:  # down or slow: the tier finds out, and comes back by itself
            pass

    def contains(self, keys: Sequence[ChunkKey], timeout: float) -> list[bool]:
        found = [False] * len(keys)
        for i, line in self._lines(b"mg %b", keys, timeout):
            found[i] = line.startswith(b"HD")
        return found

    def get(
        self, keys: Sequence[ChunkKey], allocate: Allocate, timeout: float
    ) -> Iterator[tuple[int, Parts]]:
        names = self._names(keys)
        heads: dict[int, Head | None] = {}

        def value(lane: Lane[Server], i: int, line: bytes) -> Parts | None:
            if line.startswith(b"EN"):
                return None
            nbytes, flags = _size(lane.wire, line)
            lane.ahead = max(_FEW, _AHEAD_BYTES // max(nbytes, 1))
            buffer = allocate(nbytes)
            lane.wire.read_into(buffer)
            lane.wire.expect(_END)
            if _HEAD_FLAG not in flags:
                return [buffer]
            heads[i] = _parse_head(bytes(buffer))
            return None

        request = [b"mg %b v f\r\n" % name for name in names]
        places = self._places(keys)
        for i, parts in self._batch(places, lambda i: [request[i]], value, _FEW, timeout):
            if parts is not None:
                yield i, parts
            del parts
        whole = {i: head for i, head in heads.items() if head is not None}
        torn = set(heads) - set(whole)
        yield from self._joined(names, places, whole, allocate, timeout, torn)
        if torn:
            self.delete([keys[i] for i in torn], timeout)

    def _joined(
        self,
        names: Sequence[bytes],
        places: Sequence[Address],
        heads: dict[int, Head],
        allocate: Allocate,
        timeout: float,
        torn: set[int],
    ) -> Iterator[tuple[int, Parts]]:
        """Frames from their pieces; those that lack one are noted as `torn`."""
        pieces = [(i, number) for i, head in heads.items() for number in range(head.pieces)]
        buffers: dict[int, memoryview] = {}

        def piece(lane: Lane[Server], n: int, line: bytes) -> bool:
            i, number = pieces[n]
            begin, end = heads[i].span(number)
            if line.startswith(b"EN"):
                return False
            nbytes, _ = _size(lane.wire, line)
            if nbytes != end - begin:
                raise StorageError(f"{lane.wire.address}: a piece of another size")
            if i not in buffers:
                buffers[i] = allocate(heads[i].nbytes)
            lane.wire.read_into(buffers[i][begin:end])
            lane.wire.expect(_END)
            return True

        def request(n: int) -> list[Buffer]:
            i, number = pieces[n]
            return [b"mg %b v\r\n" % heads[i].name(names[i], number)]

        left = {i: head.pieces for i, head in heads.items()}
        servers = [places[i] for i, _ in pieces]
        for n, came in self._batch(servers, request, piece, _FEW, timeout):
            i = pieces[n][0]
            left[i] -= 1
            if not came:
                torn.add(i)
            if not left[i] and i not in torn:
                yield i, [buffers.pop(i)]

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Parts]],
        chain: Sequence[ChunkKey],
        timeout: float,
    ) -> int:
        keys = [key for key, _ in frames]
        names, places = self._names(keys), self._places(keys)
        sizes = [sum(part.nbytes for part in parts) for _, parts in frames]
        limits = {address: self._limit(address, timeout) for address in dict.fromkeys(places)}
        heads = {
            i: Head.fresh(size, limits[place])
            for i, (size, place) in enumerate(zip(sizes, places, strict=True))
            if size > limits[place] > 0
        }
        there = self.contains([keys[i] for i in heads], timeout)
        stored = {i for i, known in zip(heads, there, strict=True) if known}
        heads = {i: head for i, head in heads.items() if i not in stored}
        refused = self._put_pieces(frames, names, places, heads, timeout)

        def value(i: int) -> list[Buffer]:
            if i in heads:
                head = heads[i].text
                return [self._set(names[i], len(head), b"F1 ME"), head, _END]
            return [self._set(names[i], sizes[i], b"ME"), *frames[i][1], _END]

        todo = [i for i in range(len(frames)) if i not in refused | stored]
        unused: list[int] = []
        servers = [places[i] for i in todo]
        for n, line in self._batch(servers, lambda n: value(todo[n]), _line, _FEW, timeout):
            if line.startswith((b"HD", b"NS")):
                stored.add(todo[n])
            if line.startswith(b"NS") and todo[n] in heads:
                unused.append(todo[n])
        self._delete_pieces(names, places, {i: heads[i] for i in unused}, timeout)
        self.touch(chain, timeout)
        return next((i for i in range(len(frames)) if i not in stored), len(frames))

    def _put_pieces(
        self,
        frames: Sequence[tuple[ChunkKey, Parts]],
        names: Sequence[bytes],
        places: Sequence[Address],
        heads: dict[int, Head],
        timeout: float,
    ) -> set[int]:
        """Write the pieces of frames that are too large; which of these were not taken."""
        pieces = [(i, number) for i, head in heads.items() for number in range(head.pieces)]

        def request(n: int) -> list[Buffer]:
            i, number = pieces[n]
            begin, end = heads[i].span(number)
            name = heads[i].name(names[i], number)
            return [self._set(name, end - begin, b""), *_cut(frames[i][1], begin, end), _END]

        left = {i: head.pieces for i, head in heads.items()}
        servers = [places[i] for i, _ in pieces]
        for n, line in self._batch(servers, request, _line, _FEW, timeout):
            left[pieces[n][0]] -= line.startswith(b"HD")
        return {i for i, count in left.items() if count}

    def delete(self, keys: Sequence[ChunkKey], timeout: float) -> None:
        names, places = self._names(keys), self._places(keys)
        heads = self._heads(names, places, b"", timeout)
        for _ in self._lines(b"md %b", keys, timeout):
            pass
        self._delete_pieces(names, places, heads, timeout)

    def _delete_pieces(
        self,
        names: Sequence[bytes],
        places: Sequence[Address],
        heads: dict[int, Head],
        timeout: float,
    ) -> None:
        self._each_piece(b"md %b", names, places, heads, timeout)

    def _each_piece(
        self,
        command: bytes,
        names: Sequence[bytes],
        places: Sequence[Address],
        heads: dict[int, Head],
        timeout: float,
    ) -> None:
        """A command for every piece of some frames."""
        pieces = [(i, number) for i, head in heads.items() for number in range(head.pieces)]
        lines = [command % heads[i].name(names[i], number) + _END for i, number in pieces]
        servers = [places[i] for i, _ in pieces]
        for _ in self._batch(servers, lambda n: [lines[n]], _line, _MANY, timeout):
            pass

    def _heads(
        self,
        names: Sequence[bytes],
        places: Sequence[Address],
        flags: bytes,
        timeout: float,
        sizes: dict[int, int] | None = None,
    ) -> dict[int, Head]:
        """Those of `names` that are heads; `flags` are given to memcached with the question."""
        ask = [b"mg %b s f %b\r\n" % (name, flags) for name in names]
        marked: list[int] = []
        for i, line in self._batch(places, lambda i: [ask[i]], _line, _MANY, timeout):
            if line.startswith(b"HD"):
                words = line.split()
                if sizes is not None:
                    sizes[i] = int(next(word[1:] for word in words if word.startswith(b"s")))
                if _HEAD_FLAG in words:
                    marked.append(i)
        heads: dict[int, Head] = {}

        def text(lane: Lane[Server], n: int, line: bytes) -> None:
            if line.startswith(b"EN"):
                return
            nbytes, flags = _size(lane.wire, line)
            if nbytes > 100 or _HEAD_FLAG not in flags:
                raise StorageError(f"{lane.wire.address}: a head that is none")
            buffer = memoryview(bytearray(nbytes))
            lane.wire.read_into(buffer)
            lane.wire.expect(_END)
            head = _parse_head(bytes(buffer))
            if head is not None:
                heads[marked[n]] = head

        servers = [places[i] for i in marked]
        read = [b"mg %b v f\r\n" % names[i] for i in marked]
        for _ in self._batch(servers, lambda n: [read[n]], text, _MANY, timeout):
            pass
        return heads

    def touch(self, keys: Sequence[ChunkKey], timeout: float) -> None:
        keys = list(reversed(keys))  # the root last, so that it was used last
        flags = self._expiry() if self._refresh else b""
        names, places = self._names(keys), self._places(keys)
        heads = self._heads(names, places, flags, timeout)
        self._each_piece(b"mg %b " + flags, names, places, heads, timeout)

    def scan(self) -> Iterator[Stored]:
        for address in self._servers.all:
            names = self._dump(address)
            places = [address] * len(names)
            sizes: dict[int, int] = {}
            heads = self._heads(names, places, b"", _SCAN_SECONDS, sizes)
            for i, nbytes in sizes.items():
                key = ChunkKey.parse(names[i][len(self._prefix) :].decode())
                yield Stored(key, heads[i].nbytes if i in heads else nbytes)

    def _dump(self, address: Address) -> list[bytes]:
        """The names of our chunks on one server."""
        pattern = re.compile(b"key=(" + re.escape(self._prefix) + b"[0-9a-f]{64}) ")
        names: list[bytes] = []
        with self._pool.taken(address, _SCAN_SECONDS) as wire:
            wire.begin(_SCAN_SECONDS)
            wire.send([b"lru_crawler metadump all\r\n"])
            while not (line := wire.line(b"\n")).startswith(b"END"):
                if not line.startswith(b"key="):
                    raise StorageError(
                        f"{address}: no list of keys: {line.decode(errors='replace')}"
                    )
                wire.begin(_SCAN_SECONDS)
                found = pattern.match(line.replace(b"%3A", b":"))
                if found:
                    names.append(found[1])
        return names

    def ping(self, timeout: float) -> None:
        places = self._servers.all
        for _ in self._batch(places, lambda i: [b"mn\r\n"], _line, 1, timeout):
            pass

    def close(self) -> None:
        self._servers.close()
        self._pool.close()

    def _names(self, keys: Sequence[ChunkKey]) -> list[bytes]:
        return [self._prefix + str(key).encode() for key in keys]

    def _places(self, keys: Sequence[ChunkKey]) -> list[Address]:
        return [self._servers.of(key) for key in keys]

    def _expiry(self) -> bytes:
        """The flag that says when an item ends: in whole seconds, or at a date."""
        if self._ttl is None:
            return b""
        seconds = math.ceil(self._ttl)
        return b"T%d" % (seconds if seconds <= _MONTH else time.time() + seconds)

    def _set(self, name: bytes, nbytes: int, flags: bytes) -> bytes:
        return b"ms %b %d %b %b\r\n" % (name, nbytes, flags, self._expiry())

    def _limit(self, address: Address, timeout: float) -> int:
        """Bytes of the largest value that a server takes; 0 where it does not answer."""
        try:
            with self._pool.taken(address, timeout) as wire:
                return wire.limit
        except (StorageError, OSError):
            return 0  # the batch finds out why

    def _lines(
        self, command: bytes, keys: Sequence[ChunkKey], timeout: float
    ) -> Iterator[tuple[int, bytes]]:
        """(index, answer) of a command whose answer is a line."""
        lines = [command % name + _END for name in self._names(keys)]
        return self._batch(self._places(keys), lambda i: [lines[i]], _line, _MANY, timeout)

    def _batch(
        self,
        places: Sequence[Address],
        request: Callable[[int], Sequence[Buffer]],
        answer: Callable[[Lane[Server], int, bytes], T],
        ahead: int,
        timeout: float,
    ) -> Iterator[tuple[int, T]]:
        """Send each request to its place, and yield (index, answer) as they come.

        What a server that fails should have answered is left out; raises where all fail.
        """
        shares: dict[Address, list[int]] = defaultdict(list)
        for i, place in enumerate(places):
            shares[place].append(i)
        lanes: deque[Lane[Server]] = deque()
        failures: list[Exception] = []
        try:
            for address, share in shares.items():
                try:
                    wire = self._pool.take(address, timeout)
                    lanes.append(Lane(wire, share, request, ahead))
                    wire.begin(timeout)
                    lanes[-1].fill()
                except (StorageError, OSError) as error:
                    failures.append(self._failed(lanes, address, error))
            while lanes:
                lane = lanes[0]
                try:
                    i, line = lane.next(timeout)
                    got = answer(lane, i, line)
                    lane.fill()
                except (StorageError, OSError) as error:
                    failures.append(self._failed(lanes, lane.wire.address, error))
                    continue
                self._turn(lanes)
                yield i, got
                del got
        finally:
            for lane in lanes:
                lane.wire.close()
        if failures and len(failures) == len(shares):
            raise failures[0]

    def _turn(self, lanes: deque[Lane[Server]]) -> None:
        lane = lanes[0]
        if not lane.is_done:
            return lanes.rotate(-1)
        lanes.popleft()
        self._pool.give(lane.wire)
        self._servers.works(lane.wire.address)

    def _failed(self, lanes: deque[Lane[Server]], address: Address, error: Exception) -> Exception:
        """Go on without this server."""
        for lane in [lane for lane in lanes if lane.wire.address == address]:
            lanes.remove(lane)
            lane.wire.close()
        self._pool.distrust(address)
        self._servers.failed(address, error, lambda: self._probe(address))
        text = str(error) if str(address) in str(error) else f"{address}: {error}"
        return type(error)(text) if type(error) in (StorageError, TimeoutError) else error

    def _probe(self, address: Address) -> None:
        with self._pool.taken(address, _OPEN_SECONDS) as wire:
            wire.begin(_OPEN_SECONDS)
            wire.send([b"mn\r\n"])
            wire.line()


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


class _Servers:
    """Which server has which key, and which are left alone for a while. Thread-safe.

    Rendezvous hashing (Thaler and Ravishankar, 1998): the server with the highest hash of itself
    and the key has it, so without one server only that one's keys move.
    """

    def __init__(self, addresses: Sequence[Address]) -> None:
        self.all = list(addresses)
        self._resting: set[Address] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._probes = Workers("memcached-probe", len(addresses))

    def of(self, key: ChunkKey) -> Address:
        """The server of a key."""
        if len(self.all) == 1:
            return self.all[0]
        awake = [address for address in self.all if address not in self._resting] or self.all
        return max(awake, key=lambda address: _score(address, key))

    def failed(self, address: Address, error: Exception, probe: Callable[[], None]) -> None:
        """Leave a server alone until a probe finds that it works."""
        if len(self.all) == 1:
            return
        with self._lock:
            if address in self._resting:
                return
            self._resting.add(address)
        log.warning("memcached %s is left out: %s", address, error)
        self._probes.submit(lambda: self._until_it_works(address, probe))

    def _until_it_works(self, address: Address, probe: Callable[[], None]) -> None:
        wait = REST_SECONDS / 8
        while not self._closed.wait(wait):
            wait = min(2 * wait, REST_SECONDS)
            with contextlib.suppress(Exception):
                probe()
                return self.works(address)

    def works(self, address: Address) -> None:
        """A server answered."""
        if address in self._resting:
            with self._lock:
                self._resting.discard(address)
            log.warning("memcached %s is back", address)

    def close(self) -> None:
        """Probe no more."""
        self._closed.set()
        self._probes.close()


def _score(address: Address, key: ChunkKey) -> bytes:
    return hashlib.blake2b(key, digest_size=8, key=str(address).encode()[:64]).digest()


class _Dial:
    """Makes connections as the options say."""

    def __init__(self, options: MemcachedOptions, url: Url) -> None:
        username, password = url.login
        password = from_environment(options.password_env) or password
        self._login = f"{username} {password}".encode() if username or password else b""
        self._tls = None if options.tls is None else options.tls.context()

    def __call__(self, address: Address, timeout: float) -> Server:
        """A connection that is logged in. Raises Refused where the server says no."""
        place = (address.host, address.port) if address.port else address.host
        client = Client(
            place, connect_timeout=timeout, timeout=timeout, no_delay=True, tls_context=self._tls
        )
        try:
            client._connect()
        except ssl.SSLError as error:
            kind = StorageError if isinstance(error, ssl.SSLEOFError) else Refused
            raise kind(f"{address}: {error}") from None
        except TimeoutError:
            raise TimeoutError(f"{address}: no connection within {timeout:.3g} s") from None
        except OSError as error:
            raise StorageError(f"{address}: {error}") from None
        server = Server(client.sock, address)
        try:
            self._greet(server, timeout)
        except BaseException:
            server.close()
            raise
        return server

    def _greet(self, server: Server, timeout: float) -> None:
        """Log in, and ask how large an item may be."""
        server.begin(timeout)
        if self._login:
            server.send([b"set auth 0 0 %d\r\n%b\r\n" % (len(self._login), self._login)])
            line = server.line()
            if line != b"STORED":
                raise Refused(f"{server.address}: {line.decode(errors='replace')}")
        server.send([b"stats settings\r\n"])
        server.limit = 0
        while (line := server.line()) != b"END":
            if line.startswith(b"STAT item_size_max "):
                server.limit = int(line.split()[2]) - _ITEM_OVERHEAD
            elif not line.startswith(b"STAT "):
                raise Refused(f"{server.address}: {line.decode(errors='replace')}")
        if server.limit <= 0:
            raise StorageError(f"{server.address}: does not say how large an item may be")


def _cut(parts: Parts, begin: int, end: int) -> Iterator[memoryview]:
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


def _line(lane: Lane[Server], i: int, line: bytes) -> bytes:
    """An answer of one line, unless it says that the server cannot."""
    if line.startswith((b"HD", b"EN", b"NF", b"NS", b"MN")) or b"out of memory" in line.lower():
        return line
    raise StorageError(f"{lane.wire.address}: {line[:100].decode(errors='replace')}")


def _size(wire: Server, line: bytes) -> tuple[int, list[bytes]]:
    """Bytes and flags of a value that follows."""
    words = line.split()
    if len(words) >= 2 and words[0] == b"VA" and words[1].isdigit():
        return int(words[1]), words[2:]
    raise StorageError(f"{wire.address}: {line[:100].decode(errors='replace')}")
