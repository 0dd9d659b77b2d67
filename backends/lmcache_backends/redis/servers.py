"""Redis servers, be it one, the master that Sentinel names, or the masters of a Cluster: which of
them has which key, connections to them, and batches of commands that are spread over them."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from lmcache_backends._net import batch
from lmcache_backends._net.batch import placed
from lmcache_backends._net.connection import (
    HANGS_UP,
    Buffer,
    Connection,
    HungUp,
    Pool,
    look_at_socket,
    of_tls,
)
from lmcache_backends._net.options import Address, Login, Tls
from lmcache_core.backend import (
    DaemonPool,
    DeadlineExceeded,
    Refused,
    StorageError,
    Transfer,
)

T = TypeVar("T")

_SLOTS = 16384
_HOPS = 5
"""Times that the nodes of a cluster may point to another node."""
_SENT_ON = (b"-MOVED ", b"-ASK ")
_LARGEST_WORD = 1 << 20
"""Bytes of the largest word in an answer that is not bulk."""
_DIALS = 16
"""Connections that may be made at a time."""
_FOR_GOOD = ("NOAUTH", "WRONGPASS", "NOPERM", "DENIED")
_FOR_NOW = ("LOADING", "BUSY", "MASTERDOWN", "ERR max number of clients")
"""As errors begin that will not change, and those that a login may bring and that will."""
_KNOWS_NO_USERS = "wrong number of arguments for 'auth'"
"""What a server says, before Redis 6, that has passwords and no users."""


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


class Servers(batch.Servers["RedisConnection"]):
    """All servers of a store. Thread-safe.

    `hosts`: the server; or sentinels, which know the master of the service `sentinel`; or nodes of
    a cluster.
    """

    def __init__(
        self, hosts: Sequence[Address], dial: Dial, sentinel: str | None, cluster: bool
    ) -> None:
        super().__init__(Pool(dial))
        self._dial = dial
        self._sentinel, self._cluster = sentinel, cluster
        self._seeds = deque(hosts)
        self._table: list[Address] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        known = sorted(set(self._table)) or list(self._seeds)
        return f"<Servers {', '.join(map(str, known))}: {self.pool!r}>"

    def of_all(
        self,
        names: Sequence[bytes],
        request: Callable[[int], Sequence[Buffer]],
        answer: Callable[[RedisConnection, int, bytes], T],
        transfer: Transfer,
        ahead: int = 0,
    ) -> Iterator[tuple[int, T]]:
        """Send a request for each name to its server, and yield (index, answer) as they come."""
        routes = self._routes(names, transfer)
        for _ in range(_HOPS):
            sent_on: dict[int, _Route] = {}
            for i, got in self._hop(routes, request, answer, transfer, ahead):
                if isinstance(got, _Route):
                    sent_on[i] = got
                else:
                    yield i, got
                del got
            if not sent_on:
                return
            routes = _by_route(sent_on)
        raise StorageError("the nodes of the cluster send keys to each other")

    def _hop(
        self,
        routes: Mapping[_Route, Sequence[int]],
        request: Callable[[int], Sequence[Buffer]],
        answer: Callable[[RedisConnection, int, bytes], T],
        transfer: Transfer,
        ahead: int,
    ) -> Iterator[tuple[int, T | _Route]]:
        """What the servers of `routes` say: an answer, or who else is to be asked."""

        def asking(i: int) -> Sequence[Buffer]:
            return [encode(b"ASKING"), *request(i)]

        def here(connection: RedisConnection, i: int, line: bytes) -> T | _Route:
            sent_on = line.startswith(_SENT_ON)
            return self._redirected(line, connection) if sent_on else answer(connection, i, line)

        def moving(connection: RedisConnection, i: int, line: bytes) -> T | _Route:
            if line != b"+OK":  # the answer to ASKING
                raise StorageError(f"{connection.address}: {line.decode(errors='replace')}")
            return here(connection, i, connection.line())

        settled = {route.address: i for route, i in routes.items() if not route.asking}
        yield from self.batch(settled, request, here, transfer, ahead)
        leaving = {route.address: i for route, i in routes.items() if route.asking}
        yield from self.batch(leaving, asking, moving, transfer, ahead)

    def failed(self, address: Address, error: Exception) -> None:
        """Without one of them what the others have is of no use, and it may be others by now."""
        self.distrust()
        raise error

    def _redirected(self, line: bytes, connection: RedisConnection) -> _Route:
        """Where the MOVED or ASK that came over `connection` sends us."""
        kind, slot, place = line.decode().split(" ")[:3]
        host, _, port = place.rpartition(":")
        address = Address(_host(host, connection.address), int(port))
        if kind == "-MOVED":
            if not self._cluster:
                raise StorageError("the server is a node of a cluster: set cluster: true")
            with self._lock:
                if self._table:
                    self._table[int(slot)] = address
        return _Route(address, kind == "-ASK")

    def ask(self, address: Address, *command: bytes, transfer: Transfer) -> Any:
        """A command whose answer is not bulk."""
        try:
            with self.pool.taken(address, transfer) as connection:
                return connection.ask(*command)
        except Exception:
            self.distrust()
            raise

    def addresses(self, transfer: Transfer) -> list[Address]:
        """Every server that has keys."""
        return list(dict.fromkeys(self._known(transfer)))

    def distrust(self) -> None:
        """After a failure every connection is suspect, and the master may be another one."""
        for address in set(self._table):
            self.pool.distrust(address)
        self._table = []

    def _routes(self, names: Sequence[bytes], transfer: Transfer) -> Mapping[_Route, Sequence[int]]:
        """The indices of `names` by server."""
        table = self._known(transfer)
        if len(table) == 1:
            return {_Route(table[0]): range(len(names))} if names else {}
        return _by_route({i: _Route(table[key_slot(name)]) for i, name in enumerate(names)})

    def _known(self, transfer: Transfer) -> list[Address]:
        """One server, or the server of each slot."""
        table = self._table
        if not table:
            table = self._table = self._ask_seeds(transfer)
        return table

    def _ask_seeds(self, transfer: Transfer) -> list[Address]:
        if not (self._sentinel or self._cluster):
            return [self._seeds[0]]
        for left in range(len(self._seeds), 0, -1):
            seed = self._seeds[0]
            try:  # one that hangs must not take the time of all
                return self._ask_seed(seed, Transfer(transfer.remaining() / left))
            except Refused:
                raise
            except Exception:  # whatever is wrong with this one, another may do
                self._seeds.rotate(-1)
                if left == 1:
                    raise
        raise StorageError("no host")

    def _ask_seed(self, seed: Address, transfer: Transfer) -> list[Address]:
        service = self._sentinel
        with contextlib.closing(self._dial(seed, transfer, sentinel=bool(service))) as connection:
            if service:
                command = (b"SENTINEL", b"get-master-addr-by-name", service.encode())
                return [_master(seed, service, connection.ask(*command))]
            return _slots(seed, connection.ask(b"CLUSTER", b"SLOTS"))

    def close(self) -> None:
        """Close the connections."""
        self.pool.close()
        self._dial.close()


def _by_route(routes: Mapping[int, _Route]) -> Mapping[_Route, Sequence[int]]:
    indices: dict[_Route, list[int]] = defaultdict(list)
    for i, route in routes.items():
        indices[route].append(i)
    return indices


class RedisConnection(Connection):
    """A connection that redis-py made."""

    def __init__(self, address: Address, connection: Any) -> None:
        super().__init__(connection._sock, address)
        self._connection = connection

    def ask(self, *command: bytes) -> Any:
        """A command whose answer is not bulk: bytes, an int, None or a list of these. Raises
        StorageError for what the server says instead."""
        self.send([encode(*command)])
        return self._reply()

    def greet(self, login: Login, db: int) -> None:
        """Log in, choose the database, and see that the server answers. Raises Refused where it
        says no, unless that is for now."""
        words = [word.encode() for word in login if word]
        commands = [[b"AUTH", *words]] if words else []
        commands += [[b"SELECT", b"%d" % db]] if db else []
        self.send([encode(*command) for command in [*commands, [b"PING"]]])
        for _ in commands:
            self._reply(_FOR_NOW)
        self._reply()

    def _reply(self, for_now: tuple[str, ...] = ("",)) -> Any:
        """The next answer. `for_now`: as what may come instead begins that will pass; what else
        does is Refused."""
        line = self.line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            text = rest.decode(errors="replace")
            passes = text.startswith(for_now) and not text.startswith(_FOR_GOOD)
            raise (StorageError if passes else Refused)(f"{self.address}: {text}")
        if kind not in (b":", b"$", b"*") or not rest.lstrip(b"-").isdigit():
            raise unexpected(self.address, line)
        number = int(rest)
        if kind == b":":
            return number
        if number < 0:
            return None
        return [self._reply() for _ in range(number)] if kind == b"*" else self._bulk(number)

    def _bulk(self, nbytes: int) -> bytes:
        if nbytes > _LARGEST_WORD:
            raise StorageError(f"{self.address}: an answer of {nbytes} bytes")
        buffer = bytearray(nbytes)
        self.read_into(memoryview(buffer))
        self.expect(b"\r\n")
        return bytes(buffer)

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()
        super().close()


class Dial:
    """Makes connections that are logged in. On threads, for redis-py and the resolver of names
    wait for each answer anew."""

    def __init__(self, url: Url, login: Login, sentinel_password: str, tls: Tls) -> None:
        """`login`: what to use instead of the url's."""
        self._threads = DaemonPool("lmcache-redis-dial", _DIALS)
        self._class: Any = redis.Connection
        self._late, self._hung_up = "", f"; {HANGS_UP} (rediss://)"
        """What may be why nobody answers, and why the other side hangs up."""
        self._settings: dict[str, Any] = {
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "redis_connect_func": lambda connection: None,
            "socket_keepalive": True,
        }
        if url.scheme == "unix":
            self._class = redis.UnixDomainSocketConnection
            self._hung_up = ""
            del self._settings["socket_keepalive"]
        elif url.scheme == "rediss":
            self._class = redis.SSLConnection
            self._late = " to TLS, which a plain port takes for the begin of a command"
            self._hung_up = ""
            self._settings |= _tls(tls)
        self._master = login, url.db
        self._sentinel = Login("", sentinel_password), 0

    def __call__(
        self, address: Address, transfer: Transfer, *, sentinel: bool = False
    ) -> RedisConnection:
        """A connection. Raises Refused where the server says no."""
        login, db = self._sentinel if sentinel else self._master
        try:
            return self._made(address, transfer, login, db)
        except Refused as error:
            if not login.username or _KNOWS_NO_USERS not in str(error):
                raise
        return self._made(address, transfer, login._replace(username=""), db)

    def _made(self, address: Address, transfer: Transfer, login: Login, db: int) -> RedisConnection:
        place = {"host": address.host, "port": address.port}
        if not address.port:
            look_at_socket(address.host)
        connection = self._class(
            **(place if address.port else {"path": address.host}),
            **self._settings,
            socket_timeout=transfer.timeout,
            socket_connect_timeout=transfer.timeout,
        )
        try:
            self._threads.call(connection.connect, transfer)
            made = RedisConnection(address, connection)
            made.use(transfer, transfer.timeout)
            made.greet(login, db)
        except Exception as error:
            connection.disconnect()  # which ends the thread
            raise self._translated(error, address) from None
        return made

    def _translated(self, error: Exception, address: Address) -> Exception:
        """An error of redis-py's or the system's as one of ours, which says where."""
        if isinstance(error, DeadlineExceeded):
            return DeadlineExceeded(f"{address}: {error}{self._late}")
        if isinstance(error, Refused | redis.TimeoutError):
            return error if isinstance(error, Refused) else TimeoutError(f"{address}: {error}")
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
                return Refused(f"{address}: {of_tls(error)}")
            cause = cause.__cause__ or cause.__context__
        hint = self._hung_up if isinstance(error, HungUp | ConnectionError) else ""
        return StorageError(f"{placed(error, address)}{hint}")

    def close(self) -> None:
        """End its threads."""
        self._threads.close()


def _tls(tls: Tls) -> dict[str, Any]:
    paths = {"ssl_ca_certs": tls.ca, "ssl_certfile": tls.cert, "ssl_keyfile": tls.key}
    files = {name: str(path) for name, path in paths.items() if path}
    return {**files, "ssl_cert_reqs": "required", "ssl_check_hostname": tls.check_hostname}


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


def unexpected(address: Address, line: bytes) -> StorageError:
    """For a line that is no answer, or an error of the server's."""
    text = line[:200].decode(errors="replace")
    if text.startswith("-"):
        return StorageError(f"{address}: {text[1:]}")
    return StorageError(f"{address}: the answer is not what the protocol says: {text!r}")


def encode(*words: bytes) -> bytes:
    """A command as it is sent."""
    return b"*%d\r\n" % len(words) + b"".join(map(encode_word, words))


def encode_word(word: bytes) -> bytes:
    """A part of a command."""
    return b"$%d\r\n%b\r\n" % (len(word), word)
