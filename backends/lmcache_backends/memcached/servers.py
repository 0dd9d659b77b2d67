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
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from pymemcache.client.base import Client

from lmcache_backends._net.connection import Buffer, Lane, Pool, Refused, Wire
from lmcache_backends._net.options import Address, Login
from lmcache_core.backend import ChunkKey, DaemonPool, StorageError

log = logging.getLogger("lmcache_core")
T = TypeVar("T")

REST_SECONDS = 2.0
"""How long a server that failed is left alone, at most, before it is asked again."""
OPEN_SECONDS = 1.0
MANY = 4096
"""Commands with short answers that may be under way on one connection."""
_ITEM_OVERHEAD = 512
"""Bytes of an item that its key, its header and the slab's own take, at most."""


class Dial:
    """Makes connections that are logged in, and notes what the servers take."""

    def __init__(self, login: Login, tls: ssl.SSLContext | None) -> None:
        self.limits: dict[Address, int] = {}
        """Bytes of the largest value that each server took when it was last connected to."""
        self._login = " ".join(login).encode() if any(login) else b""
        self._tls = tls

    def __call__(self, address: Address, timeout: float) -> Wire:
        """A connection. Raises Refused where the server says no."""
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
        wire = Wire(client.sock, address)
        try:
            wire.begin(timeout)
            self._log_in(wire)
            self.limits[address] = _largest(wire)
        except BaseException:
            wire.close()
            raise
        return wire

    def _log_in(self, wire: Wire) -> None:
        if self._login:
            wire.send([b"set auth 0 0 %d\r\n%b\r\n" % (len(self._login), self._login)])
            line = wire.line()
            if line != b"STORED":
                raise Refused(_says(wire, line))


def _largest(wire: Wire) -> int:
    """Bytes of the largest value that the server takes."""
    wire.send([b"stats settings\r\n"])
    limit = 0
    while (line := wire.line()) != b"END":
        if found := re.fullmatch(rb"STAT item_size_max ([0-9]+)", line):
            limit = int(found[1]) - _ITEM_OVERHEAD
        elif not line.startswith(b"STAT "):
            raise Refused(_says(wire, line))
    if limit <= 0:
        raise StorageError(f"{wire.address}: does not say how large an item may be")
    return limit


class Servers:
    """All servers of a store. Thread-safe."""

    def __init__(self, addresses: Sequence[Address], dial: Dial) -> None:
        self.all = list(addresses)
        self.pool = Pool(dial)
        self._dial = dial
        self._resting: set[Address] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._probes = DaemonPool("memcached-probe", len(addresses))

    def of(self, key: ChunkKey) -> Address:
        """The server of a key."""
        if len(self.all) == 1:
            return self.all[0]
        awake = [address for address in self.all if address not in self._resting] or self.all
        return max(awake, key=lambda address: _score(address, key))

    def limit(self, address: Address, timeout: float) -> int:
        """Bytes of the largest value that a server takes; 0 where it does not answer."""
        if address not in self._dial.limits:  # then there is no connection yet
            with contextlib.suppress(StorageError, OSError), self.pool.taken(address, timeout):
                pass
        return self._dial.limits.get(address, 0)

    def ask(
        self, places: Sequence[Address], lines: Sequence[bytes], timeout: float
    ) -> Iterator[tuple[int, bytes]]:
        """(index, answer) of commands whose answer is a line."""
        return self.batch(places, lambda i: [lines[i]], one_line, MANY, timeout)

    def ping(self, timeout: float) -> None:
        """Raises where no server works."""
        for _ in self.ask(self.all, [b"mn\r\n"] * len(self.all), timeout):
            pass

    def batch(
        self,
        places: Sequence[Address],
        request: Callable[[int], Sequence[Buffer]],
        answer: Callable[[Lane[Wire], int, bytes], T],
        ahead: int,
        timeout: float,
    ) -> Iterator[tuple[int, T]]:
        """Send each request to its place, and yield (index, answer) as they come.

        What a server that fails should have answered is left out; raises where all fail.
        """
        shares: dict[Address, list[int]] = defaultdict(list)
        for i, place in enumerate(places):
            shares[place].append(i)
        lanes: deque[Lane[Wire]] = deque()
        failures: list[Exception] = []
        try:
            for address, share in shares.items():
                try:
                    wire = self.pool.take(address, timeout)
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

    def _turn(self, lanes: deque[Lane[Wire]]) -> None:
        """Go on with the next lane; one that is done has shown that its server works."""
        lane = lanes[0]
        if not lane.is_done:
            return lanes.rotate(-1)
        lanes.popleft()
        self.pool.give(lane.wire)
        self._works(lane.wire.address)

    def _failed(self, lanes: deque[Lane[Wire]], address: Address, error: Exception) -> Exception:
        """Go on without this server; returns what to raise where it was the last."""
        for lane in [lane for lane in lanes if lane.wire.address == address]:
            lanes.remove(lane)
            lane.wire.close()
        self.pool.distrust(address)
        self._rest(address, error)
        text = str(error) if str(address) in str(error) else f"{address}: {error}"
        return type(error)(text) if type(error) in (StorageError, TimeoutError) else error

    def _rest(self, address: Address, error: Exception) -> None:
        """Leave a server alone until a probe finds that it works."""
        if len(self.all) == 1:
            return
        with self._lock:
            if address in self._resting:
                return
            self._resting.add(address)
        log.warning("memcached %s is left out: %s", address, error)
        try:
            self._probes.submit(lambda: self._until_it_works(address))
        except RuntimeError:  # no thread can be had, and nothing else would find out
            self._works(address)

    def _until_it_works(self, address: Address) -> None:
        wait = REST_SECONDS / 8
        while not self._closed.wait(wait):
            wait = min(2 * wait, REST_SECONDS)
            with contextlib.suppress(Exception):  # whatever it is, the server does not work yet
                self._probe(address)
                return self._works(address)

    def _probe(self, address: Address) -> None:
        with self.pool.taken(address, OPEN_SECONDS) as wire:
            wire.begin(OPEN_SECONDS)
            wire.send([b"mn\r\n"])
            wire.line()

    def _works(self, address: Address) -> None:
        """A server answered."""
        if address in self._resting:
            with self._lock:
                self._resting.discard(address)
            log.warning("memcached %s is back", address)

    def close(self) -> None:
        """Probe no more, and close the connections."""
        self._closed.set()
        self._probes.close()
        self.pool.close()


def _score(address: Address, key: ChunkKey) -> bytes:
    return hashlib.blake2b(key, digest_size=8, key=str(address).encode()[:64]).digest()


def one_line(lane: Lane[Wire], i: int, line: bytes) -> bytes:
    """An answer of one line, unless it says that the server cannot."""
    if line.startswith((b"HD", b"EN", b"NF", b"NS", b"MN")) or b"out of memory" in line.lower():
        return line
    raise StorageError(_says(lane.wire, line))


def value_follows(wire: Wire, line: bytes) -> tuple[int, list[bytes]]:
    """Bytes and flags of a value that comes after this line."""
    words = line.split()
    if len(words) >= 2 and words[0] == b"VA" and words[1].isdigit():
        return int(words[1]), words[2:]
    raise StorageError(_says(wire, line))


def _says(wire: Wire, line: bytes) -> str:
    return f"{wire.address}: {line[:100].decode(errors='replace')}"
