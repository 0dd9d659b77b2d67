"""redis: a Redis or Valkey server, a master that Sentinel names, or a Cluster.

    <prefix>:<64 hex digits>     a whole frame, as a string value

redis-py connects, authenticates and encrypts; the bulk goes over its sockets by our own hands:
commands of a batch follow each other without waiting, values are read into their destination and
written from where they lie. Redis copies every reply that waits to be read, so no more than two
values (or 512 KiB) are asked for ahead: with 32 the same server gives half the bytes a second.

Which chunks stay is the server's affair (`maxmemory-policy`); a `ttl` is ours.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit

import redis
from pydantic import Field, SecretStr, model_validator
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

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
)

T = TypeVar("T")

LARGEST = 512 << 20
"""Bytes of the largest value that Redis takes."""
_FEW = 2
_AHEAD_BYTES = 512 << 10
_MANY = 4096
"""Commands with short answers that may be under way on one connection."""
_SLOTS = 16384
_HOPS = 5
"""Times that the nodes of a cluster may point to another node."""
_OPEN_SECONDS = 1.0
_SCAN_SECONDS = 10.0
_END = b"\r\n"
_SENT_ON = (b"-MOVED ", b"-ASK ")


class RedisOptions(Expiry):
    """`url`: redis://[user[:password]@]host[:port][/db], rediss:// (TLS) or unix://path[?db=n].
    Several hosts, with commas between, are sentinels or seeds of a cluster.
    `sentinel`: the name of the service whose master the hosts tell. `cluster`: they are nodes of
    one. `password_env`, `sentinel_password_env`: variables that hold the passwords.
    """

    url: SecretStr
    prefix: Prefix = "lmcache"
    sentinel: str | None = None
    cluster: bool = False
    password_env: str | None = None
    sentinel_password_env: str | None = None
    tls: Tls = Field(default_factory=Tls)

    @model_validator(mode="after")
    def _fits_together(self) -> RedisOptions:
        url = parse_url(self.url.get_secret_value())
        if self.sentinel and self.cluster:
            raise ValueError("expected either sentinel or cluster")
        if len(url.hosts) > 1 and not (self.sentinel or self.cluster):
            raise ValueError("several hosts need sentinel: <service>, or cluster: true")
        if url.db and self.cluster:
            raise ValueError("a cluster has no numbered databases")
        if self.tls != Tls() and url.scheme != "rediss":
            raise ValueError("tls needs a url that begins with rediss://")
        return self

    def identity(self) -> str:
        """Two tiers of equal identity would be one store."""
        url = parse_url(self.url.get_secret_value())
        hosts = ",".join(str(host) for host in sorted(url.hosts))
        return f"{hosts}/{url.db} {self.sentinel or ''} {self.prefix}"


class Url(NamedTuple):
    """What a url says."""

    scheme: str
    hosts: tuple[Address, ...]
    login: Login
    db: int


def parse_url(text: str) -> Url:
    """Raises ValueError, which never quotes the url: it may hold a password."""
    try:
        parts = urlsplit(text)
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        login, place = Login.parse(parts.netloc)
        path = parts.path
        if parts.scheme == "unix":
            hosts: tuple[Address, ...] = (Address(place + path, 0),)
            path = ""
        elif parts.scheme in ("redis", "rediss"):
            hosts = tuple(Address.parse(host, 6379) for host in place.split(","))
        else:
            raise ValueError
        db = int(query.pop("db", None) or path.strip("/") or 0)
        if query or db < 0:
            raise ValueError
    except ValueError:
        raise ValueError(
            "expected redis://[user[:password]@]host[:port][/db], rediss://... or unix://path"
        ) from None
    return Url(parts.scheme, hosts, login, db)


class RedisBackend(StorageBackend):
    """Frames as string values of a Redis server, or of the masters of a Cluster."""

    Options = RedisOptions

    def __init__(self, options: RedisOptions) -> None:
        self._prefix = options.prefix.encode() + b":"
        self._refresh = options.refresh
        self._expiry = b"%d" % max(1, round(options.ttl * 1000)) if options.ttl else b""
        conditions = [b"NX", b"PX", self._expiry] if options.ttl else [b"NX"]
        self._words = 3 + len(conditions)
        self._set_end = _END + b"".join(_word(word) for word in conditions)
        self._links = _Links(options)
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
        for i, there in self._batch(b"EXISTS", names, timeout):
            found[i] = there == 1
        return found

    def get(
        self, keys: Sequence[ChunkKey], allocate: Allocate, timeout: float
    ) -> Iterator[tuple[int, Parts]]:
        names = self._names(keys)

        def value(lane: Lane[Link], line: bytes) -> Parts | None:
            if line.startswith(b"-WRONGTYPE"):
                return [memoryview(b"")]  # not a frame, which the tier finds out and removes
            nbytes = _number(lane, line, b"$")
            if nbytes < 0:
                return None
            lane.ahead = max(_FEW, _AHEAD_BYTES // max(nbytes, 1))
            buffer = allocate(nbytes)
            lane.wire.read_into(buffer)
            lane.wire.expect(_END)
            return [buffer]

        def request(i: int) -> list[Buffer]:
            return [_command(b"GET", names[i])]

        for i, parts in self._exchange(names, request, value, _FEW, timeout):
            if parts is not None:
                yield i, parts
            del parts

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Parts]],
        chain: Sequence[ChunkKey],
        timeout: float,
    ) -> int:
        sizes = [sum(part.nbytes for part in parts) for _, parts in frames]
        fit = next((i for i, nbytes in enumerate(sizes) if nbytes > LARGEST), len(frames))
        names = self._names([key for key, _ in frames[:fit]])

        def request(i: int) -> list[Buffer]:
            return [self._set_begin(names[i], sizes[i]), *frames[i][1], self._set_end]

        left = dict.fromkeys(range(fit + 1))
        for i, there in self._exchange(names, request, _taken, _FEW, timeout):
            if not there:
                break
            del left[i]
        self.touch(chain, timeout)
        return min(left)

    def delete(self, keys: Sequence[ChunkKey], timeout: float) -> None:
        for _ in self._batch(b"UNLINK", self._names(keys), timeout):
            pass

    def scan(self) -> Iterator[Stored]:
        for address in self._links.addresses(_SCAN_SECONDS):
            for names in self._scan(address):
                for i, nbytes in self._batch(b"STRLEN", names, _SCAN_SECONDS):
                    yield Stored(ChunkKey.parse(names[i][len(self._prefix) :].decode()), nbytes)

    def _scan(self, address: Address) -> Iterator[list[bytes]]:
        """The names of our keys on one server, in portions; a key may come twice."""
        pattern = re.compile(re.escape(self._prefix) + rb"[0-9a-f]{64}")
        seen: set[bytes] = set()
        cursor = b"0"
        while True:
            scan = ("SCAN", cursor, "MATCH", self._prefix + b"*", "COUNT", 1000)
            cursor, found = self._links.ask(address, *scan, timeout=_SCAN_SECONDS)
            names = {name for name in found if pattern.fullmatch(name)} - seen
            seen |= names
            yield list(names)
            if cursor == b"0":
                return

    def touch(self, keys: Sequence[ChunkKey], timeout: float) -> None:
        names = self._names(reversed(keys))  # the root last, so that it was used last
        command = (b"PEXPIRE", self._expiry) if self._refresh else (b"TOUCH",)
        for _ in self._batch(command[0], names, timeout, *command[1:]):
            pass

    def ping(self, timeout: float) -> None:
        for address in self._links.addresses(timeout):
            self._links.ask(address, "PING", timeout=timeout)

    def close(self) -> None:
        self._links.pool.close()

    def _names(self, keys: Iterable[ChunkKey]) -> list[bytes]:
        return [self._prefix + str(key).encode() for key in keys]

    def _set_begin(self, name: bytes, nbytes: int) -> bytes:
        return b"*%d\r\n$3\r\nSET\r\n%b$%d\r\n" % (self._words, _word(name), nbytes)

    def _batch(
        self, command: bytes, names: Sequence[bytes], timeout: float, *arguments: bytes
    ) -> Iterator[tuple[int, int]]:
        """(index, answer) of a command that says a number of each key."""

        def request(i: int) -> list[Buffer]:
            return [_command(command, names[i], *arguments)]

        def number(lane: Lane[Link], line: bytes) -> int:
            if line.startswith(b"-WRONGTYPE"):
                return 0
            return _number(lane, line, b":")

        return self._exchange(names, request, number, _MANY, timeout)

    def _exchange(
        self,
        names: Sequence[bytes],
        request: Callable[[int], Sequence[Buffer]],
        answer: Callable[[Lane[Link], bytes], T],
        ahead: int,
        timeout: float,
    ) -> Iterator[tuple[int, T]]:
        """Send a request for each name to its server, and yield (index, answer) as they come."""
        routes = self._links.routes(names, timeout)
        for _ in range(_HOPS):
            sent_on: Routes = defaultdict(list)
            with self._links.lanes(routes, request, ahead, timeout) as lanes:
                while lanes:
                    i, line = lanes[0].next(timeout)
                    if line.startswith(_SENT_ON):
                        sent_on[self._links.redirected(line, lanes[0].wire)].append(i)
                        self._links.turn(lanes)
                        continue
                    got = answer(lanes[0], line)
                    self._links.turn(lanes)
                    yield i, got
                    del got
            if not sent_on:
                return
            routes = sent_on
        raise StorageError("the nodes of the cluster send keys to each other")


class Route(NamedTuple):
    """A server; `asking` where a key is about to move there and it must be told that we know."""

    address: Address
    asking: bool = False


Routes = dict[Route, list[int]]
"""Places in a batch by where their keys are."""


class Link(Wire):
    """A connection that redis-py made."""

    def __init__(self, address: Address, connection: Any) -> None:
        super().__init__(connection._sock, address)
        self._connection = connection

    def ask(self, *command: object, timeout: float) -> Any:
        """A command whose answer is not bulk, through redis-py's own parser."""
        try:
            self._connection._sock.settimeout(timeout)
            self._connection.send_command(*command, check_health=False)
            return self._connection.read_response()
        except redis.RedisError as error:
            raise _translated(error, self.address) from None

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()


class _Asking(Lane[Link]):
    """A lane to the node that slots are moving to."""

    def __init__(
        self,
        wire: Link,
        waiting: Iterable[int],
        request: Callable[[int], Sequence[Buffer]],
        ahead: int,
    ) -> None:
        super().__init__(wire, waiting, lambda i: [_command(b"ASKING"), *request(i)], ahead)

    def next(self, timeout: float) -> tuple[int, bytes]:
        self.wire.begin(timeout)
        self.wire.expect(b"+OK\r\n")
        return super().next(timeout)


class _Links:
    """Idle connections, and which server has which key. Thread-safe."""

    def __init__(self, options: RedisOptions) -> None:
        self._options = options
        url = parse_url(options.url.get_secret_value())
        self._dial = _Dial(options, url)
        self._seeds = deque(url.hosts)
        self._table: list[Address] = []
        self._lock = threading.Lock()
        self.pool = Pool(self._dial)

    def routes(self, names: Sequence[bytes], timeout: float) -> Routes:
        """The places of `names` by server."""
        table = self._known(timeout)
        routes: Routes = defaultdict(list)
        for i, name in enumerate(names):
            routes[Route(table[key_slot(name)] if len(table) > 1 else table[0])].append(i)
        return routes

    def addresses(self, timeout: float) -> list[Address]:
        """Every server that has keys."""
        return list(dict.fromkeys(self._known(timeout)))

    def _known(self, timeout: float) -> list[Address]:
        """One server, or the server of each slot."""
        table = self._table
        if not table:
            table = self._table = self._ask_seeds(timeout)
        return table

    def _ask_seeds(self, timeout: float) -> list[Address]:
        if not (self._options.sentinel or self._options.cluster):
            return [self._seeds[0]]
        for left in range(len(self._seeds), 0, -1):
            seed = self._seeds[0]
            try:  # one that hangs must not take the time of all
                return self._ask_seed(seed, timeout / len(self._seeds))
            except Refused:
                raise
            except Exception:  # whatever is wrong with this one, another may do
                self._seeds.rotate(-1)
                if left == 1:
                    raise
        raise StorageError("no host")

    def _ask_seed(self, seed: Address, timeout: float) -> list[Address]:
        service = self._options.sentinel
        with contextlib.closing(self._dial(seed, timeout, sentinel=bool(service))) as link:
            if service:
                command = ("SENTINEL", "get-master-addr-by-name", service)
                return [_master(seed, service, link.ask(*command, timeout=timeout))]
            return _slots(seed, link.ask("CLUSTER", "SLOTS", timeout=timeout))

    def redirected(self, line: bytes, link: Link) -> Route:
        """Where the MOVED or ASK that came over `link` sends us."""
        kind, slot, place = line.decode().split(" ")[:3]
        host, _, port = place.rpartition(":")
        address = Address(_host(host, link.address), int(port))
        if kind == "-MOVED":
            if not self._options.cluster:
                raise StorageError("the server is a node of a cluster: set cluster: true")
            with self._lock:
                if self._table:
                    self._table[int(slot)] = address
        return Route(address, kind == "-ASK")

    @contextlib.contextmanager
    def lanes(
        self,
        routes: Routes,
        request: Callable[[int], Sequence[Buffer]],
        ahead: int,
        timeout: float,
    ) -> Iterator[deque[Lane[Link]]]:
        """A lane to each server of `routes`, all of them asked. What is left of them is closed."""
        lanes: deque[Lane[Link]] = deque()
        try:
            for route, places in routes.items():
                link = self.pool.take(route.address, timeout)
                kind = _Asking if route.asking else Lane[Link]
                lanes.append(kind(link, places, request, ahead))
            for lane in lanes:
                lane.wire.begin(timeout)
                lane.fill()
            yield lanes
        except Exception:  # a caller that stops listening is none: what is idle stays good
            self.distrust()
            raise
        finally:
            for lane in lanes:
                lane.wire.close()

    def turn(self, lanes: deque[Lane[Link]]) -> None:
        """Keep the first lane busy, and go on with the next."""
        lane = lanes[0]
        lane.fill()
        if lane.is_done:
            lanes.popleft()
            self.pool.give(lane.wire)
        else:
            lanes.rotate(-1)

    def ask(self, address: Address, *command: object, timeout: float) -> Any:
        """A command whose answer is not bulk."""
        try:
            with self.pool.taken(address, timeout) as link:
                return link.ask(*command, timeout=timeout)
        except Exception:
            self.distrust()
            raise

    def distrust(self) -> None:
        """After a failure every connection is suspect, and the master may be another one."""
        for address in set(self._table):
            self.pool.distrust(address)
        self._table = []


class _Dial:
    """Makes connections as the options say."""

    def __init__(self, options: RedisOptions, url: Url) -> None:
        self._class: Any = redis.Connection
        self._settings: dict[str, Any] = {
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "socket_keepalive": True,
        }
        if url.scheme == "unix":
            self._class = redis.UnixDomainSocketConnection
            del self._settings["socket_keepalive"]
        elif url.scheme == "rediss":
            self._class = redis.SSLConnection
            self._settings |= _tls(options.tls)
        password = from_environment(options.password_env) or url.login.password
        self._master = {
            "db": url.db,
            "username": url.login.username or None,
            "password": password or None,
        }
        self._sentinel = {"password": from_environment(options.sentinel_password_env) or None}

    def __call__(self, address: Address, timeout: float, *, sentinel: bool = False) -> Link:
        """A connection that is logged in. Raises Refused where the server says no."""
        place = {"host": address.host, "port": address.port}
        connection = self._class(
            **(place if address.port else {"path": address.host}),
            **self._settings,
            **(self._sentinel if sentinel else self._master),
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
        )
        try:
            connection.connect()
        except redis.ResponseError as error:
            raise Refused(f"{address}: {error}") from None
        except redis.RedisError as error:
            raise _translated(error, address) from None
        return Link(address, connection)


def _tls(tls: Tls) -> dict[str, Any]:
    paths = {"ssl_ca_certs": tls.ca, "ssl_certfile": tls.cert, "ssl_keyfile": tls.key}
    files = {name: str(path) for name, path in paths.items() if path}
    return {**files, "ssl_cert_reqs": "required", "ssl_check_hostname": tls.check_hostname}


def _translated(error: Exception, address: Address) -> Exception:
    """redis-py's error as one of ours."""
    text = f"{address}: {error}"
    if isinstance(error, redis.TimeoutError):
        return TimeoutError(text)
    if isinstance(error, redis.AuthenticationError | redis.exceptions.NoPermissionError):
        return Refused(text)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return Refused(text)
        cause = cause.__cause__ or cause.__context__
    return StorageError(text)


def _master(seed: Address, service: str, answer: Any) -> Address:
    if not answer:
        raise Refused(f"{seed}: the sentinel knows no service {service!r}")
    host, port = answer
    return Address(host.decode(), int(port))


def _slots(seed: Address, answer: Any) -> list[Address]:
    """The master of each slot, from CLUSTER SLOTS."""
    table: list[Address | None] = [None] * _SLOTS
    for first, last, (host, port, *_), *_replicas in answer:
        master = Address(_host((host or b"").decode(), seed), int(port))
        table[first : last + 1] = [master] * (last + 1 - first)
    known = [master for master in table if master is not None]
    if len(known) < _SLOTS:
        raise StorageError(f"{seed}: {_SLOTS - len(known)} slots of the cluster are not served")
    return known


def _host(told: str, asked: Address) -> str:
    """A node that does not know its own name means the host that was asked."""
    return asked.host if told in ("", "?") else told


def _word(word: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(word), word)


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(map(_word, words))


def _number(lane: Lane[Link], line: bytes, kind: bytes) -> int:
    """The number of an answer such as ":1" or "$4096". Raises what the server says instead."""
    if line.startswith(kind):
        with contextlib.suppress(ValueError):
            return int(line[1:])
    raise _unexpected(lane, line)


def _taken(lane: Lane[Link], line: bytes) -> bool:
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
