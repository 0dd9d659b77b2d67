"""redis: a Redis or Valkey server, a master that Sentinel names, or a Cluster.

    <prefix>:<64 hex digits>     a whole frame, as a string value

redis-py connects, authenticates and encrypts; the bulk goes over its sockets by our own hands:
commands of a batch follow each other without waiting, values are read into their destination and
written from where they lie. Redis copies all of a reply before it sends any of it, and much of
that into memory which it has to get first: so a large value is asked for in pieces, two ahead.

Which chunks stay is the server's affair (`maxmemory-policy`); a `ttl` is ours.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from lmcache_backends._net.connection import Buffer, Lane, Refused
from lmcache_backends._net.options import Address, from_environment
from lmcache_backends.redis.options import RedisOptions
from lmcache_backends.redis.servers import (
    Dial,
    Link,
    Servers,
    encode,
    encode_word,
    parse_url,
)
from lmcache_core.backend import (
    Allocate,
    Buffers,
    ChunkKey,
    ConfigError,
    StorageBackend,
    StorageError,
    Stored,
)

LARGEST = 512 << 20
"""Bytes of the largest value that Redis takes."""
PIECE = 2 << 20
"""Bytes that are asked for at once: of a value, or of values that are smaller."""
_FEW = 2
_MANY = 4096
"""Commands with short answers that may be under way on one connection."""
_OPEN_SECONDS = 1.0
_SCAN_SECONDS = 10.0
_END = b"\r\n"


class RedisBackend(StorageBackend):
    """Frames as string values of a Redis server, or of the masters of a Cluster."""

    Options = RedisOptions
    schemes = (
        "redis", "rediss", "unix", "valkey", "valkeys", "resp", "redis-cluster", "redis-sentinel",
    )  # fmt: skip

    def __init__(self, options: RedisOptions) -> None:
        self._prefix = options.prefix.encode() + b":"
        self._refresh = options.refresh
        self._expiry = b"%d" % max(1, round(options.ttl * 1000)) if options.ttl else b""
        conditions = [b"NX", b"PX", self._expiry] if options.ttl else [b"NX"]
        self._words = 3 + len(conditions)
        self._set_end = _END + b"".join(map(encode_word, conditions))
        url = parse_url(options.url.get_secret_value())
        login = url.login.with_password_of(options.password_env)
        sentinel_password = from_environment(options.sentinel_password_env)
        dial = Dial(url, login, sentinel_password, options.tls)
        self._servers = Servers(url.hosts, dial, options.sentinel, options.cluster)
        self._servers.pool.on_progress = lambda: self.on_progress()  # the tier's, once it is set
        try:
            self.ping(_OPEN_SECONDS)
        except Refused as error:
            raise ConfigError(f"url: {error}") from None
        except Exception:
            # Down, slow, or no Redis, of which redis-py may make anything: a failure like one later
            # on. The tier finds out, and comes back by itself.
            pass

    def contains(self, keys: Sequence[ChunkKey], timeout: float) -> list[bool]:
        names = self._names(keys)
        found = [False] * len(keys)
        for i, there in self._numbers(b"EXISTS", names, timeout):
            found[i] = there == 1
        return found

    def get(
        self, keys: Sequence[ChunkKey], allocate: Allocate, timeout: float
    ) -> Iterator[tuple[int, Buffers]]:
        names = self._names(keys)
        sizes = dict(self._numbers(b"STRLEN", names, timeout))
        large = {i: nbytes for i, nbytes in sizes.items() if PIECE < nbytes <= LARGEST}
        small = [i for i in sizes if i not in large]
        ahead = max(_FEW, PIECE // max([1, *(sizes[i] for i in small)]))
        yield from self._whole(names, small, allocate, ahead, timeout)
        yield from self._joined(names, large, allocate, timeout)

    def _whole(
        self,
        names: Sequence[bytes],
        places: Sequence[int],
        allocate: Allocate,
        ahead: int,
        timeout: float,
    ) -> Iterator[tuple[int, Buffers]]:
        """Values at these places of `names`, whatever they are now."""

        def request(n: int) -> list[Buffer]:
            return [encode(b"GET", names[places[n]])]

        def value(lane: Lane[Link], n: int, line: bytes) -> memoryview | None:
            if line.startswith(b"-WRONGTYPE"):
                return memoryview(b"")  # not a frame, which the tier finds out and removes
            nbytes = _number(lane, line, b"$")
            if nbytes < 0:
                return None
            buffer = allocate(nbytes)
            lane.wire.read_into(buffer)
            lane.wire.expect(_END)
            return buffer

        asked = [names[i] for i in places]
        for n, buffer in self._servers.batch(asked, request, value, ahead, timeout):
            if buffer is not None:
                yield places[n], [buffer]
            del buffer

    def _joined(
        self, names: Sequence[bytes], sizes: dict[int, int], allocate: Allocate, timeout: float
    ) -> Iterator[tuple[int, Buffers]]:
        """Values of these sizes from their pieces, by place in `names`."""
        pieces = [
            (i, begin, min(begin + PIECE, nbytes))
            for i, nbytes in sorted(sizes.items())
            for begin in range(0, nbytes, PIECE)
        ]
        left = Counter(i for i, _, _ in pieces)
        buffers: dict[int, memoryview] = {}
        gone: set[int] = set()

        def request(n: int) -> list[Buffer]:
            i, begin, end = pieces[n]
            last = end if end == sizes[i] else end - 1  # one byte more shows a longer value
            return [encode(b"GETRANGE", names[i], b"%d" % begin, b"%d" % last)]

        def piece(lane: Lane[Link], n: int, line: bytes) -> None:
            i, begin, end = pieces[n]
            lane.goes_on = end < sizes[i]
            nbytes = -1 if line.startswith(b"-WRONGTYPE") else _number(lane, line, b"$")
            if nbytes != end - begin:  # removed meanwhile, or replaced
                gone.add(i)
                target = memoryview(bytearray(max(0, min(nbytes, PIECE + 1))))
            else:
                if i not in buffers:
                    buffers[i] = allocate(sizes[i])
                target = buffers[i][begin:end]
            if nbytes >= 0:
                lane.wire.read_into(target)
                lane.wire.expect(_END)

        asked = [names[i] for i, _, _ in pieces]
        for n, _ in self._servers.batch(asked, request, piece, _FEW, timeout):
            i = pieces[n][0]
            left[i] -= 1
            if not left[i]:
                buffer = buffers.pop(i, None)
                if buffer is not None and i not in gone:
                    yield i, [buffer]
                del buffer

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        chain: Sequence[ChunkKey],
        timeout: float,
    ) -> int:
        sizes = [sum(part.nbytes for part in parts) for _, parts in frames]
        fit = next((i for i, nbytes in enumerate(sizes) if nbytes > LARGEST), len(frames))
        names = self._names([key for key, _ in frames[:fit]])

        def request(i: int) -> list[Buffer]:
            return [self._set_begin(names[i], sizes[i]), *frames[i][1], self._set_end]

        left = dict.fromkeys(range(fit + 1))
        for i, there in self._servers.batch(names, request, _taken, _FEW, timeout):
            if not there:
                break
            del left[i]
        self.touch(chain, timeout)
        return min(left)

    def delete(self, keys: Sequence[ChunkKey], timeout: float) -> None:
        for _ in self._numbers(b"UNLINK", self._names(keys), timeout):
            pass

    def scan(self) -> Iterator[Stored]:
        for address in self._servers.addresses(_SCAN_SECONDS):
            for names in self._scan(address):
                for i, nbytes in self._numbers(b"STRLEN", names, _SCAN_SECONDS):
                    key = ChunkKey.parse(names[i][len(self._prefix) :].decode())
                    yield Stored(key, max(0, nbytes))

    def _scan(self, address: Address) -> Iterator[list[bytes]]:
        """The names of our keys on one server, in portions; a key may come twice."""
        pattern = re.compile(re.escape(self._prefix) + rb"[0-9a-f]{64}")
        seen: set[bytes] = set()
        cursor = b"0"
        while True:
            scan = ("SCAN", cursor, "MATCH", self._prefix + b"*", "COUNT", 1000)
            cursor, found = self._servers.ask(address, *scan, timeout=_SCAN_SECONDS)
            names = {name for name in found if pattern.fullmatch(name)} - seen
            seen |= names
            yield list(names)
            if cursor == b"0":
                return

    def touch(self, keys: Sequence[ChunkKey], timeout: float) -> None:
        names = self._names(reversed(keys))  # the root last, so that it was used last
        command = (b"PEXPIRE", self._expiry) if self._refresh else (b"TOUCH",)
        for _ in self._numbers(command[0], names, timeout, *command[1:]):
            pass

    def ping(self, timeout: float) -> None:
        for address in self._servers.addresses(timeout):
            self._servers.ask(address, "PING", timeout=timeout)

    def close(self) -> None:
        self._servers.pool.close()

    def _names(self, keys: Iterable[ChunkKey]) -> list[bytes]:
        return [self._prefix + str(key).encode() for key in keys]

    def _set_begin(self, name: bytes, nbytes: int) -> bytes:
        return b"*%d\r\n$3\r\nSET\r\n%b$%d\r\n" % (self._words, encode_word(name), nbytes)

    def _numbers(
        self, command: bytes, names: Sequence[bytes], timeout: float, *arguments: bytes
    ) -> Iterator[tuple[int, int]]:
        """(index, answer) of a command that says a number of each key; -1 where it is no string."""

        def request(i: int) -> list[Buffer]:
            return [encode(command, names[i], *arguments)]

        def number(lane: Lane[Link], i: int, line: bytes) -> int:
            if line.startswith(b"-WRONGTYPE"):
                return -1
            return _number(lane, line, b":")

        return self._servers.batch(names, request, number, _MANY, timeout)


def _number(lane: Lane[Link], line: bytes, kind: bytes) -> int:
    """The number of an answer such as ":1" or "$4096". Raises what the server says instead."""
    if line.startswith(kind):
        with contextlib.suppress(ValueError):
            return int(line[1:])
    raise _unexpected(lane, line)


def _taken(lane: Lane[Link], i: int, line: bytes) -> bool:
    """The answer to SET NX: whether the value is there now."""
    if line in (b"+OK", b"$-1"):
        return True
    if line.startswith(b"-OOM "):
        return False
    raise _unexpected(lane, line)


def _unexpected(lane: Lane[Link], line: bytes) -> StorageError:
    told = line.startswith(b"-")
    text = line[1:].decode(errors="replace") if told else "the answer is not what the protocol says"
    return StorageError(f"{lane.wire.address}: {text}")
