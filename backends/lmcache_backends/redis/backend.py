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
from collections.abc import Iterable, Iterator, Sequence

from lmcache_backends._net.batch import LARGE, Assembly
from lmcache_backends._net.connection import Buffer
from lmcache_backends._net.options import Address, from_environment
from lmcache_backends.redis.options import RedisOptions
from lmcache_backends.redis.servers import (
    Dial,
    RedisConnection,
    Servers,
    encode,
    encode_word,
    parse_url,
    unexpected,
)
from lmcache_core.backend import (
    Buffers,
    ChunkKey,
    StorageBackend,
    Stored,
    Transfer,
    nbytes_of,
)

LARGEST = 512 << 20
"""Bytes of the largest value that Redis takes."""
PIECE = 2 << 20
"""Bytes that are asked for at once: of a value, or of values that are smaller."""
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

    def __repr__(self) -> str:
        return f"<RedisBackend: {self._servers!r}>"

    def contains(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        names = self._names(keys)
        found = [False] * len(keys)
        for i, there in self._numbers(b"EXISTS", names, transfer):
            found[i] = there == 1
        return found

    def get(self, keys: Sequence[ChunkKey], transfer: Transfer) -> Iterator[tuple[int, Buffers]]:
        names = self._names(keys)
        sizes = dict(self._numbers(b"STRLEN", names, transfer))
        odd = [i for i, nbytes in sizes.items() if nbytes > min(LARGEST, transfer.limit)]
        large = {i: nbytes for i, nbytes in sizes.items() if i not in odd and nbytes > PIECE}
        small = [i for i in sizes if i not in odd and i not in large]
        for i in odd:  # not a frame, which the tier finds out and removes
            yield i, [memoryview(b"")]
        yield from self._whole(names, small, transfer)
        yield from self._joined(names, large, transfer)

    def _whole(
        self, names: Sequence[bytes], indices: Sequence[int], transfer: Transfer
    ) -> Iterator[tuple[int, Buffers]]:
        """Those of `names`, whatever their values are now."""

        def request(n: int) -> list[Buffer]:
            return [encode(b"GET", names[indices[n]])]

        def value(connection: RedisConnection, n: int, line: bytes) -> memoryview | None:
            if line.startswith(b"-WRONGTYPE"):
                return memoryview(b"")  # not a frame, which the tier finds out and removes
            nbytes = _number(connection, line, b"$")
            if nbytes < 0:
                return None
            buffer = transfer.allocate(nbytes)
            connection.read_into(buffer)
            connection.expect(_END)
            return buffer

        asked = [names[i] for i in indices]
        for n, buffer in self._servers.of_all(asked, request, value, transfer, PIECE):
            if buffer is not None:
                yield indices[n], [buffer]
            del buffer

    def _joined(
        self, names: Sequence[bytes], sizes: dict[int, int], transfer: Transfer
    ) -> Iterator[tuple[int, Buffers]]:
        """Values of these sizes from their pieces, by index in `names`."""
        pieces = [
            (i, begin, min(begin + PIECE, nbytes))
            for i, nbytes in sorted(sizes.items())
            for begin in range(0, nbytes, PIECE)
        ]
        values = Assembly(sizes, pieces, transfer)

        def request(n: int) -> list[Buffer]:
            i, begin, end = pieces[n]
            last = end if end == sizes[i] else end - 1  # one byte more shows a longer value
            return [encode(b"GETRANGE", names[i], b"%d" % begin, b"%d" % last)]

        def piece(connection: RedisConnection, n: int, line: bytes) -> None:
            _, begin, end = pieces[n]
            nbytes = -1 if line.startswith(b"-WRONGTYPE") else _number(connection, line, b"$")
            if nbytes == end - begin:
                connection.read_into(values.target(n))
            else:  # removed meanwhile, or replaced
                values.miss(n)
                connection.skip(max(0, nbytes))
            if nbytes >= 0:
                connection.expect(_END)

        asked = [names[i] for i, _, _ in pieces]
        for n, _ in self._servers.of_all(asked, request, piece, transfer, PIECE):
            whole = values.take(n)
            if whole is not None:
                yield whole[0], [whole[1]]
            del whole

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> int:
        sizes = [nbytes_of(parts) for _, parts in frames]
        fit = next((i for i, nbytes in enumerate(sizes) if nbytes > LARGEST), len(frames))
        names = self._names([key for key, _ in frames[:fit]])

        def request(i: int) -> list[Buffer]:
            return [self._set_begin(names[i], sizes[i]), *frames[i][1], self._set_end]

        left = dict.fromkeys(range(fit + 1))
        for i, there in self._servers.of_all(names, request, _taken, transfer, LARGE):
            if not there:
                break
            del left[i]
        return min(left)

    def delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        for _ in self._numbers(b"UNLINK", self._names(keys), transfer):
            pass

    def scan(self, transfer: Transfer) -> Iterator[Stored]:
        for address in self._servers.addresses(transfer):
            for names in self._scan(address, transfer):
                for i, nbytes in self._numbers(b"STRLEN", names, transfer):
                    key = ChunkKey.parse(names[i][len(self._prefix) :].decode())
                    yield Stored(key, max(0, nbytes))

    def _scan(self, address: Address, transfer: Transfer) -> Iterator[list[bytes]]:
        """The names of our keys on one server, in portions; a key may come twice."""
        pattern = re.compile(re.escape(self._prefix) + rb"[0-9a-f]{64}")
        seen: set[bytes] = set()
        cursor = b"0"
        while True:
            scan = (b"SCAN", cursor, b"MATCH", self._prefix + b"*", b"COUNT", b"1000")
            cursor, found = self._servers.ask(address, *scan, transfer=transfer)
            names = {name for name in found if pattern.fullmatch(name)} - seen
            seen |= names
            yield list(names)
            if cursor == b"0":
                return

    def touch(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        names = self._names(reversed(keys))  # the root last, so that it was used last
        command = (b"PEXPIRE", self._expiry) if self._refresh else (b"TOUCH",)
        for _ in self._numbers(command[0], names, transfer, *command[1:]):
            pass

    def ping(self, transfer: Transfer) -> None:
        for address in self._servers.addresses(transfer):
            self._servers.ask(address, b"PING", transfer=transfer)

    def close(self) -> None:
        self._servers.close()

    def _names(self, keys: Iterable[ChunkKey]) -> list[bytes]:
        return [self._prefix + str(key).encode() for key in keys]

    def _set_begin(self, name: bytes, nbytes: int) -> bytes:
        return b"*%d\r\n$3\r\nSET\r\n%b$%d\r\n" % (self._words, encode_word(name), nbytes)

    def _numbers(
        self, command: bytes, names: Sequence[bytes], transfer: Transfer, *arguments: bytes
    ) -> Iterator[tuple[int, int]]:
        """(index, answer) of a command that says a number of each key; -1 where it is no string."""

        def request(i: int) -> list[Buffer]:
            return [encode(command, names[i], *arguments)]

        def number(connection: RedisConnection, i: int, line: bytes) -> int:
            if line.startswith(b"-WRONGTYPE"):
                return -1
            return _number(connection, line, b":")

        return self._servers.of_all(names, request, number, transfer)


def _number(connection: RedisConnection, line: bytes, kind: bytes) -> int:
    """The number of an answer such as ":1" or "$4096". Raises what the server says instead."""
    if line.startswith(kind):
        with contextlib.suppress(ValueError):
            return int(line[1:])
    raise unexpected(connection.address, line)


def _taken(connection: RedisConnection, i: int, line: bytes) -> bool:
    """The answer to SET NX: whether the value is there now."""
    if line in (b"+OK", b"$-1"):
        return True
    if line.startswith(b"-OOM "):
        return False
    raise unexpected(connection.address, line)
