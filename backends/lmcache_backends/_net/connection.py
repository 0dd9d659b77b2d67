"""What the network backends share: connections to servers, each with the clock of the call that
uses it, and a pool of them."""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import ssl
import stat
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from lmcache_backends._net.options import Address
from lmcache_core.backend import LOG, DeadlineExceeded, StorageError, Transfer

_IOV_MAX = 1024
_KEPT = 16
"""Idle connections to keep to each server."""
_DIAL_SHARE = 0.95
"""Of the time there is, so that a call hears what it waited for before it has had its time."""
_SMALL = 16 << 10
"""Bytes of the buffer that replies are read through, and of parts that TLS sends together."""
_FEW_PACKETS = 128 << 10
"""Bytes for which waiting for all of them is not worth the system calls."""
_AT_ONCE = 2 << 20
"""Bytes of a value to wait for before any is read."""
_STEP = 0.02
"""Seconds to wait for so many; then what is there is read, so that it counts when it came."""

HANGS_UP = "a server that speaks TLS hangs up on who does not"
"""What may be why, where the first answer is none."""
_PLAIN = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST")
"""What OpenSSL says of an answer that is no TLS, from version to version."""

Buffer = bytes | memoryview


def of_tls(error: BaseException) -> str:
    """What an error of TLS, or of a client library about one, says."""
    text = " ".join(str(error).split())
    plain = any(word in text for word in _PLAIN)
    return f"{text}: the port does not speak TLS" if plain else text


def look_at_socket(path: str) -> None:
    """Warn of a socket of another user in a directory where any user could have made it. Whether
    that is the store's user nobody can tell from here."""
    with contextlib.suppress(OSError):
        owner, directory = os.stat(path).st_uid, os.stat(os.path.dirname(path) or ".")
        if owner not in (0, os.geteuid()) and directory.st_mode & stat.S_IWOTH:
            LOG.warn(
                f"socket {path}",
                f"{path} belongs to user {owner}, in a directory where any user may listen: "
                "whoever does chooses what a model reads. Keep it in one of the server's own",
            )


class HungUp(StorageError):
    """The other side closed the connection."""


class Connection:
    """A connected stream socket, for one call at a time.

    Payloads are read straight into their destination and written from where they lie; short
    replies go through a buffer. Raises DeadlineExceeded when the call has had its time or the
    other side is silent for too long, StorageError when it closes or says what it should not,
    OSError for the rest.
    """

    def __init__(self, sock: socket.socket, address: Address) -> None:
        sock.setblocking(False)
        self.address = address
        self.received = 0
        """Bytes, in all."""
        self._sock = sock
        self._encrypted = isinstance(sock, ssl.SSLSocket)
        self._poll = select.poll()
        self._bytes = bytearray(_SMALL)
        self._buffer = memoryview(self._bytes)
        self._start = self._end = 0
        self._low = 1
        """Bytes that have to be there before the system wakes us."""
        self._transfer = Transfer(0.0)
        self._silence = 0.0

    def __repr__(self) -> str:
        state = "closed" if self._sock.fileno() < 0 else "open"
        return f"<{type(self).__name__} {self.address}: {state}, {self.received} bytes received>"

    def use(self, transfer: Transfer, silence: float) -> None:
        """From now on it works for this call; `silence`: seconds that the other side may keep."""
        self._transfer, self._silence = transfer, silence

    def send(self, parts: Sequence[Buffer]) -> None:
        """Write buffers that follow each other, without joining them."""
        left = [memoryview(part) for part in parts if len(part)]
        if self._encrypted:
            return self._send_encrypted(left)
        while left:
            sent = self._send(self._sock.sendmsg, left[:_IOV_MAX])
            while left and sent >= left[0].nbytes:
                sent -= left.pop(0).nbytes
            if sent:
                left[0] = left[0][sent:]

    def _send_encrypted(self, left: list[memoryview]) -> None:
        """TLS copies anyway, a record for each call: so small parts go together."""
        while left:
            part = left.pop(0)
            if part.nbytes < _SMALL and left:
                together = bytearray(part)
                while left and len(together) + left[0].nbytes <= _SMALL:
                    together += left.pop(0)
                part = memoryview(together)
            while part.nbytes:
                part = part[self._send(self._sock.send, part[: 1 << 20]) :]

    def line(self, end: bytes = b"\r\n") -> bytes:
        """The next line, without its end."""
        while (at := self._bytes.find(end, self._start, self._end)) < 0:
            self._receive_more()
        line = bytes(self._buffer[self._start : at])
        self._start = at + len(end)
        return line

    def _receive_more(self) -> None:
        """Read what there is behind what is buffered, which is moved to the front."""
        rest = bytes(self._buffer[self._start : self._end])
        self._buffer[: len(rest)] = rest
        self._start, self._end = 0, len(rest)
        if len(rest) == _SMALL:
            raise StorageError("the answer is not what the protocol says: a line without an end")
        self._end += self._receive(self._buffer[self._end :])

    def read_into(self, target: memoryview) -> None:
        """Fill `target` with what comes next."""
        ready = min(self._end - self._start, target.nbytes)
        target[:ready] = self._buffer[self._start : self._start + ready]
        self._start += ready
        while ready < target.nbytes:
            self._wake_at(target.nbytes - ready)
            ready += self._receive(target[ready:])
        self._wake_at(1)

    def skip(self, nbytes: int) -> None:
        """Read so many bytes that nobody wants."""
        scratch = memoryview(bytearray(min(nbytes, _AT_ONCE)))
        while nbytes:
            part = scratch[:nbytes]
            self.read_into(part)
            nbytes -= part.nbytes

    def _wake_at(self, nbytes: int) -> None:
        """Have the system wake us when so many bytes are there, or _AT_ONCE, and not for each
        packet: every time costs a turn at a core, and one at the interpreter."""
        low = min(nbytes, _AT_ONCE) if nbytes > _FEW_PACKETS and not self._encrypted else 1
        if low != self._low:
            with contextlib.suppress(OSError):  # a system that cannot wakes us more often
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low)
            self._low = low

    def expect(self, text: bytes) -> None:
        """Read `text`; raises StorageError where something else comes."""
        while self._end - self._start < len(text):
            self._receive_more()
        end = self._start + len(text)
        if self._buffer[self._start : end] != text:
            raise StorageError("the answer is not what the protocol says: a value of another size")
        self._start = end

    def is_quiet(self) -> bool:
        """Whether the other side is still there and says nothing unasked."""
        return self._start == self._end and not self._is_ready(select.POLLIN, 0.0)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _send(self, step: Callable[..., int], what: object) -> int:
        """How many bytes one system call took."""
        sent = self._when_ready(step, what, select.POLLOUT)
        self._transfer.moved(sent)
        return sent

    def _receive(self, target: memoryview) -> int:
        """How many bytes one system call brought."""
        if self._low > 1:  # what is there already may be too few to be worth the call
            self._is_ready(select.POLLIN, min(_STEP, self._left(time.monotonic())))
        n = self._when_ready(self._sock.recv_into, target, select.POLLIN)
        if n == 0:
            raise HungUp("the server closed the connection")
        self.received += n
        self._transfer.moved(n)
        return n

    def _when_ready(self, step: Callable[..., int], what: object, event: int) -> int:
        began = time.monotonic()
        while True:
            try:
                return step(what)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                if isinstance(error, ssl.SSLWantReadError):
                    event = select.POLLIN
                elif isinstance(error, ssl.SSLWantWriteError):
                    event = select.POLLOUT
            left = self._left(began)
            self._is_ready(event, left if self._low == 1 else min(_STEP, left))

    def _left(self, began: float) -> float:
        """Seconds to wait for what is waited for since `began`."""
        silence = self._silence - (time.monotonic() - began)
        left = self._transfer.remaining()
        if left <= 0:
            raise self._transfer.late()
        if silence <= 0:
            raise DeadlineExceeded(f"no answer within {self._silence:.3g} s")
        return min(left, silence)

    def _is_ready(self, event: int, seconds: float) -> bool:
        self._poll.register(self._sock, event)
        return bool(self._poll.poll(math.ceil(1000 * seconds)))


C = TypeVar("C", bound=Connection)


class Pool(Generic[C]):
    """Connections by server. Thread-safe."""

    def __init__(self, dial: Callable[[Address, Transfer], C]) -> None:
        """`dial`: makes a connection to a server."""
        self._dial = dial
        self._idle: dict[Address, list[C]] = defaultdict(list)
        self._lock = threading.Lock()
        self._closed = False

    def __repr__(self) -> str:
        idle = sum(len(connections) for connections in list(self._idle.values()))
        return f"<Pool: {idle} idle connections to {len(self._idle)} servers>"

    def take(self, address: Address, transfer: Transfer, silence: float | None = None) -> C:
        """A connection for the caller alone, for this call; `silence`: seconds that the server
        may keep, those of the call unless given."""
        silence = transfer.timeout if silence is None else silence
        connection = self._idle_one(address)
        if connection is None:
            transfer.check()
            patience = min(silence, transfer.remaining()) * _DIAL_SHARE
            connection = self._dial(address, Transfer(patience))
        connection.use(transfer, silence)
        return connection

    def _idle_one(self, address: Address) -> C | None:
        while True:
            with self._lock:
                if not self._idle[address]:
                    return None
                connection = self._idle[address].pop()
            if connection.is_quiet():
                return connection
            connection.close()  # the server closed it, or says what nobody asked

    def give(self, connection: C) -> None:
        """Hand a connection back on which everything is answered."""
        with self._lock:
            idle = self._idle[connection.address]
            if not self._closed and len(idle) < _KEPT:
                idle.append(connection)
                return
        connection.close()

    @contextlib.contextmanager
    def taken(self, address: Address, transfer: Transfer) -> Iterator[C]:
        """A connection for one question; closed, with all that are idle, where that fails."""
        connection = self.take(address, transfer)
        try:
            yield connection
        except BaseException:
            connection.close()
            self.distrust(address)
            raise
        self.give(connection)

    def distrust(self, address: Address) -> None:
        """After a failure every connection to a server is suspect."""
        with self._lock:
            connections = self._idle.pop(address, [])
        for connection in connections:
            connection.close()

    def close(self) -> None:
        """Close what is idle now, and the rest when it is given back."""
        self._closed = True
        for address in list(self._idle):
            self.distrust(address)
