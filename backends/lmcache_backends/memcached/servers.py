"""Memcached servers: which of them has which key, connections to them, and batches of commands that
are spread over them.

Rendezvous hashing (Thaler and Ravishankar, 1998): the server with the highest hash of itself and
the key has it, so without one server only that one's keys move. A server that fails is left alone,
and its keys are the others', until a probe finds that it works.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import ssl
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from pymemcache.client.base import Client

from lmcache_backends._net import batch
from lmcache_backends._net.batch import placed
from lmcache_backends._net.connection import (
    HANGS_UP,
    Connection,
    HungUp,
    Pool,
    look_at_socket,
    of_tls,
)
from lmcache_backends._net.options import Address, Login
from lmcache_core.backend import (
    Breaker,
    ChunkKey,
    DaemonPool,
    DeadlineExceeded,
    Refused,
    State,
    StorageError,
    Transfer,
)

log = logging.getLogger("lmcache_core")

_SHARE = 0.75
"""Of a call's time, what one server among several may be silent for: the others are waited for,
too."""
_PROBE_SECONDS = 1.0
_DIALS = 16
"""Connections that may be made at a time."""
_ITEM_OVERHEAD = 512
"""Bytes of an item that its key, its header and the slab's own take, at most."""


class Dial:
    """Makes connections that are logged in, and notes what the servers take. On threads, for the
    client library and the resolver of names wait for each answer anew."""

    def __init__(self, login: Login, tls: ssl.SSLContext | None) -> None:
        self.limits: dict[Address, int] = {}
        """Bytes of the largest value that each server took when it was last connected to."""
        self._login = " ".join(login).encode() if any(login) else b""
        self._tls = tls
        self._threads = DaemonPool("lmcache-memcached-dial", _DIALS)

    def __call__(self, address: Address, transfer: Transfer) -> Connection:
        """A connection. Raises Refused where the server says no."""
        place = (address.host, address.port) if address.port else address.host
        if not address.port:
            look_at_socket(address.host)
        client = Client(
            place,
            connect_timeout=transfer.timeout,
            timeout=transfer.timeout,
            no_delay=True,
            tls_context=self._tls,
        )
        try:
            self._threads.call(client._connect, transfer)
        except ssl.SSLError as error:
            kind = StorageError if isinstance(error, ssl.SSLEOFError) else Refused
            raise kind(f"{address}: {of_tls(error)}") from None
        except TimeoutError:
            seconds = f"{transfer.timeout:.3g} s"
            raise DeadlineExceeded(f"{address}: no connection within {seconds}") from None
        except OSError as error:
            raise StorageError(f"{address}: {error}") from None
        connection = Connection(client.sock, address)
        try:
            connection.use(transfer, transfer.timeout)
            self._log_in(connection)
            self.limits[address] = _largest(connection)
        except BaseException as error:
            connection.close()
            if self._tls is None and isinstance(error, HungUp | ConnectionError):
                hint = f"; {HANGS_UP} (tls: {{}})" if address.port else ""
                raise StorageError(f"{placed(error, address)}{hint}") from None
            raise
        return connection

    def close(self) -> None:
        """End its threads."""
        self._threads.close()

    def _log_in(self, connection: Connection) -> None:
        if self._login:
            connection.send([b"set auth 0 0 %d\r\n%b\r\n" % (len(self._login), self._login)])
            line = connection.line()
            if line != b"STORED":
                raise _no(connection, line)


def _largest(connection: Connection) -> int:
    """Bytes of the largest value that the server takes."""
    connection.send([b"stats settings\r\n"])
    limit = 0
    while (line := connection.line()) != b"END":
        if found := re.fullmatch(rb"STAT item_size_max ([0-9]+)", line):
            limit = int(found[1]) - _ITEM_OVERHEAD
        elif not line.startswith(b"STAT "):
            raise _no(connection, line)
    if limit <= 0:
        raise StorageError(f"{connection.address}: does not say how large an item may be")
    return limit


class Servers(batch.Servers[Connection]):
    """All servers of a store. Thread-safe."""

    def __init__(self, addresses: Sequence[Address], dial: Dial) -> None:
        super().__init__(Pool(dial))
        self.all = list(addresses)
        self._dial = dial
        several = self.all if len(self.all) > 1 else []
        self._breakers = {address: self._breaker(address) for address in several}

    def __repr__(self) -> str:
        out = [str(address) for address, breaker in self._breakers.items() if breaker.bypassed]
        return f"<Servers {', '.join(map(str, self.all))}: left out {out}, {self.pool!r}>"

    def _breaker(self, address: Address) -> Breaker:
        def changed(state: State, cause: str) -> None:
            news = "is left out" if state == State.BYPASSED else "is back"
            log.warning("memcached %s %s: %s", address, news, cause)

        return Breaker(f"memcached {address}", lambda: self._probe(address), changed)

    def _probe(self, address: Address) -> None:
        with self.pool.taken(address, Transfer(_PROBE_SECONDS)) as connection:
            connection.send([b"mn\r\n"])
            connection.line()

    def in_use(self) -> list[Address]:
        """The servers that are not left out; all where no other is left."""
        breakers = self._breakers
        works = [each for each in self.all if each not in breakers or not breakers[each].bypassed]
        return works or self.all

    def is_out(self, address: Address) -> bool:
        """Whether a server failed, and others did not."""
        return address not in self.in_use()

    def of(self, keys: Sequence[ChunkKey]) -> list[Address]:
        """The server of each key."""
        servers = self.in_use()
        if len(servers) == 1:
            return servers * len(keys)
        return [max(servers, key=lambda each: _score(each, key)) for key in keys]

    def limit(self, address: Address, transfer: Transfer) -> int:
        """Bytes of the largest value that a server takes; 0 where it does not answer."""
        if address not in self._dial.limits:  # then there is no connection yet
            with contextlib.suppress(StorageError, OSError):
                for _ in self.ask([address], [b"mn\r\n"], transfer):
                    pass
        return self._dial.limits.get(address, 0)

    def ask(
        self, places: Sequence[Address], lines: Sequence[bytes], transfer: Transfer
    ) -> Iterator[tuple[int, bytes]]:
        """(index, answer) of commands whose answer is a line."""
        return self.batch(shares(places), lambda i: [lines[i]], one_line, transfer)

    def ping(self, transfer: Transfer) -> None:
        """Raises where no server works."""
        servers = self.in_use()
        for _ in self.ask(servers, [b"mn\r\n"] * len(servers), transfer):
            pass

    def silence(self, transfer: Transfer) -> float:
        """Seconds of silence that one server may keep."""
        return transfer.timeout * (_SHARE if len(self.in_use()) > 1 else 1.0)

    def failed(self, address: Address, error: Exception) -> None:
        """Leave a server alone until a probe finds that it works."""
        if breaker := self._breakers.get(address):
            breaker.failed(str(error), at_once=True)

    def worked(self, address: Address) -> None:
        """A server answered its share of a batch."""
        if breaker := self._breakers.get(address):
            breaker.succeeded()

    def close(self) -> None:
        """Probe no more, and close the connections."""
        for breaker in self._breakers.values():
            breaker.close()
        self.pool.close()
        self._dial.close()


def shares(places: Sequence[Address]) -> Mapping[Address, Sequence[int]]:
    """The indices of a batch by server."""
    by_server: dict[Address, list[int]] = defaultdict(list)
    for i, address in enumerate(places):
        by_server[address].append(i)
    return by_server


def _score(address: Address, key: ChunkKey) -> bytes:
    return hashlib.blake2b(key, digest_size=8, key=str(address).encode()[:64]).digest()


def one_line(connection: Connection, i: int, line: bytes) -> bytes:
    """An answer of one line, unless it says that the server cannot."""
    if line.startswith((b"HD", b"EN", b"NF", b"NS", b"MN")) or b"out of memory" in line.lower():
        return line
    raise StorageError(_says(connection, line))


def value_follows(connection: Connection, line: bytes) -> tuple[int, list[bytes]]:
    """Bytes and flags of a value that comes after this line."""
    words = line.split()
    if len(words) >= 2 and words[0] == b"VA" and words[1].isdigit():
        return int(words[1]), words[2:]
    raise StorageError(_says(connection, line))


def _no(connection: Connection, line: bytes) -> StorageError:
    """What a server says that lets nobody in; what is not memcached's may be a proxy's word, while
    the server starts."""
    kind = Refused if line.startswith((b"ERROR", b"CLIENT_ERROR")) else StorageError
    return kind(_says(connection, line))


def _says(connection: Connection, line: bytes) -> str:
    return f"{connection.address}: {line[:100].decode(errors='replace')}"
