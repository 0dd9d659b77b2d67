"""Redis servers, be it one, the master that Sentinel names, or the masters of a Cluster: which of
them has which key, connections to them, and batches of commands that are spread over them."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from lmcache_backends._net.connection import Buffer, Lane, Pool, Refused, Wire
from lmcache_backends._net.options import Address, Login, Tls
from lmcache_core.backend import StorageError

T = TypeVar("T")

_SLOTS = 16384
_HOPS = 5
"""Times that the nodes of a cluster may point to another node."""
_SENT_ON = (b"-MOVED ", b"-ASK ")


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
        if "://" not in text:
            raise ValueError
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


class _Route(NamedTuple):
    """A server; `asking` where a key is about to move there and it must be told that we know."""

    address: Address
    asking: bool = False


_Routes = dict[_Route, list[int]]
"""Places in a batch by where their keys are."""


class Servers:
    """All servers of a store. Thread-safe.

    `hosts`: the server; or sentinels, which know the master of the service `sentinel`; or nodes of
    a cluster.
    """

    def __init__(
        self, hosts: Sequence[Address], dial: Dial, sentinel: str | None, cluster: bool
    ) -> None:
        self.pool = Pool(dial)
        self._dial = dial
        self._sentinel, self._cluster = sentinel, cluster
        self._seeds = deque(hosts)
        self._table: list[Address] = []
        self._lock = threading.Lock()

    def batch(
        self,
        names: Sequence[bytes],
        request: Callable[[int], Sequence[Buffer]],
        answer: Callable[[Lane[Link], int, bytes], T],
        ahead: int,
        timeout: float,
    ) -> Iterator[tuple[int, T]]:
        """Send a request for each name to its server, and yield (index, answer) as they come."""
        routes = self._routes(names, timeout)
        for _ in range(_HOPS):
            sent_on: _Routes = defaultdict(list)
            with self._lanes(routes, request, ahead, timeout) as lanes:
                while lanes:
                    i, line = lanes[0].next(timeout)
                    if line.startswith(_SENT_ON):
                        sent_on[self._redirected(line, lanes[0].wire)].append(i)
                        self._turn(lanes)
                        continue
                    got = answer(lanes[0], i, line)
                    self._turn(lanes)
                    yield i, got
                    del got
            if not sent_on:
                return
            routes = sent_on
        raise StorageError("the nodes of the cluster send keys to each other")

    @contextlib.contextmanager
    def _lanes(
        self,
        routes: _Routes,
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

    def _turn(self, lanes: deque[Lane[Link]]) -> None:
        """Keep the first lane busy, and go on with the next."""
        lane = lanes[0]
        lane.fill()
        if lane.is_done:
            lanes.popleft()
            self.pool.give(lane.wire)
        else:
            lanes.rotate(-1)

    def _redirected(self, line: bytes, link: Link) -> _Route:
        """Where the MOVED or ASK that came over `link` sends us."""
        kind, slot, place = line.decode().split(" ")[:3]
        host, _, port = place.rpartition(":")
        address = Address(_host(host, link.address), int(port))
        if kind == "-MOVED":
            if not self._cluster:
                raise StorageError("the server is a node of a cluster: set cluster: true")
            with self._lock:
                if self._table:
                    self._table[int(slot)] = address
        return _Route(address, kind == "-ASK")

    def ask(self, address: Address, *command: object, timeout: float) -> Any:
        """A command whose answer is not bulk."""
        try:
            with self.pool.taken(address, timeout) as link:
                return link.ask(*command, timeout=timeout)
        except Exception:
            self.distrust()
            raise

    def addresses(self, timeout: float) -> list[Address]:
        """Every server that has keys."""
        return list(dict.fromkeys(self._known(timeout)))

    def distrust(self) -> None:
        """After a failure every connection is suspect, and the master may be another one."""
        for address in set(self._table):
            self.pool.distrust(address)
        self._table = []

    def _routes(self, names: Sequence[bytes], timeout: float) -> _Routes:
        """The places of `names` by server."""
        table = self._known(timeout)
        routes: _Routes = defaultdict(list)
        for i, name in enumerate(names):
            routes[_Route(table[key_slot(name)] if len(table) > 1 else table[0])].append(i)
        return routes

    def _known(self, timeout: float) -> list[Address]:
        """One server, or the server of each slot."""
        table = self._table
        if not table:
            table = self._table = self._ask_seeds(timeout)
        return table

    def _ask_seeds(self, timeout: float) -> list[Address]:
        if not (self._sentinel or self._cluster):
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
        service = self._sentinel
        with contextlib.closing(self._dial(seed, timeout, sentinel=bool(service))) as link:
            if service:
                command = ("SENTINEL", "get-master-addr-by-name", service)
                return [_master(seed, service, link.ask(*command, timeout=timeout))]
            return _slots(seed, link.ask("CLUSTER", "SLOTS", timeout=timeout))


class Link(Wire):
    """A connection that redis-py made."""

    def __init__(self, address: Address, connection: Any) -> None:
        super().__init__(connection._sock, address)
        self._connection = connection

    def ask(self, *command: object, timeout: float) -> Any:
        """A command whose answer is not bulk, through redis-py's own parser."""
        try:
            self.begin(timeout)
            self._connection.send_command(*command, check_health=False)
            return self._connection.read_response()
        except redis.RedisError as error:
            raise _translated(error, self.address) from None

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()
        super().close()


class _Asking(Lane[Link]):
    """A lane to the node that slots are moving to."""

    def __init__(
        self,
        wire: Link,
        waiting: Iterable[int],
        request: Callable[[int], Sequence[Buffer]],
        ahead: int,
    ) -> None:
        super().__init__(wire, waiting, lambda i: [encode(b"ASKING"), *request(i)], ahead)

    def next(self, timeout: float) -> tuple[int, bytes]:
        self.wire.begin(timeout)
        self.wire.expect(b"+OK\r\n")
        return super().next(timeout)


class Dial:
    """Makes connections that are logged in."""

    def __init__(self, url: Url, login: Login, sentinel_password: str, tls: Tls) -> None:
        """`login`: what to use instead of the url's."""
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
            self._settings |= _tls(tls)
        username, password = (text or None for text in login)
        self._master = {"db": url.db, "username": username, "password": password}
        self._sentinel = {"password": sentinel_password or None}

    def __call__(self, address: Address, timeout: float, *, sentinel: bool = False) -> Link:
        """A connection. Raises Refused where the server says no."""
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


def encode(*words: bytes) -> bytes:
    """A command as it is sent."""
    return b"*%d\r\n" % len(words) + b"".join(map(encode_word, words))


def encode_word(word: bytes) -> bytes:
    """A part of a command."""
    return b"$%d\r\n%b\r\n" % (len(word), word)
