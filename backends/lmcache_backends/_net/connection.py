"""What the network backends share: a socket with deadlines, connections to servers, and commands
that follow each other on them without waiting."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from lmcache_backends._net.options import Address
from lmcache_core.backend import StorageError

SLOWEST = 16 << 20
"""Bytes a second: what moves slower than this, over all connections that are in use, counts as
stuck, as it does for a tier."""
_IOV_MAX = 1024
_KEPT = 16
"""Idle connections to keep to each server."""
_SMALL = 16 << 10
"""Bytes of the buffer that replies are read through, and of parts that TLS sends together."""
_FEW_PACKETS = 128 << 10
"""Bytes for which waiting for all of them is not worth the system calls."""
_AT_ONCE = 2 << 20
"""Bytes of a value to wait for before any is read."""

Buffer = bytes | memoryview


class Refused(StorageError):
    """The server, or its certificate, says no: trying again does not help."""


class Wire:
    """A connected stream socket.

    Payloads are read straight into their destination and written from where they lie; short
    replies go through a buffer. Silence lasts no longer than the patience that `begin` sets, and
    a trickle no longer than twice that; the patience grows with what moves, the more the more
    connections share the line. Raises TimeoutError when it ends, StorageError when the other side
    closes or says what it should not, OSError for the rest.
    """

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self.address = address
        self._sock = sock
        self._bytes = bytearray(_SMALL)
        self._buffer = memoryview(self._bytes)
        self._start = self._end = 0
        self._low = 1
        """Bytes that have to be there before the system wakes us."""
        self._deadline = self._patience = self._moved_at = 0.0
        self.users: set[Wire] = {self}
        """The connections that share the line."""
        self.on_progress: Callable[[], None] = lambda: None
        """Called when bytes came."""

    def begin(self, timeout: float) -> None:
        """From now on, wait for at most `timeout` seconds, and longer only for what moves."""
        self._deadline = time.monotonic() + timeout
        if timeout != self._patience:  # it costs a system call
            self._patience = timeout
            self._sock.settimeout(timeout)

    def go_on(self) -> None:
        """Wait for as long as was left when something moved last: since then nobody waited."""
        self._deadline += time.monotonic() - self._moved_at

    def send(self, parts: Sequence[Buffer]) -> None:
        """Write buffers that follow each other, without joining them."""
        left = [memoryview(part) for part in parts if len(part)]
        if isinstance(self._sock, ssl.SSLSocket):
            return self._send_encrypted(self._sock, left)
        while left:
            sent = self._move(self._sock.sendmsg, left[:_IOV_MAX])
            while left and sent >= left[0].nbytes:
                sent -= left.pop(0).nbytes
            if sent:
                left[0] = left[0][sent:]

    def _send_encrypted(self, sock: ssl.SSLSocket, left: list[memoryview]) -> None:
        """TLS copies anyway, a record for each call: so small parts go together."""
        while left:
            part = left.pop(0)
            if part.nbytes < _SMALL and left:
                together = bytearray(part)
                while left and len(together) + left[0].nbytes <= _SMALL:
                    together += left.pop(0)
                part = memoryview(together)
            while part.nbytes:
                part = part[self._move(sock.send, part[: 1 << 20]) :]

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
            self._wait_for(target.nbytes - ready)
            ready += self._receive(target[ready:])
        self._wait_for(1)

    def _wait_for(self, nbytes: int) -> None:
        """Have the system wake us when so many bytes are there, or _AT_ONCE, and not for each
        packet: every time costs a turn at a core, and one at the interpreter. What moves at
        SLOWEST still comes within the patience."""
        if isinstance(self._sock, ssl.SSLSocket):  # it may have taken some of them already
            return
        most = min(_AT_ONCE, int(self._patience * self._share()) // 2)
        low = max(1, min(nbytes, most)) if nbytes > _FEW_PACKETS else 1
        if low != self._low:
            with contextlib.suppress(OSError):  # a system that cannot wakes us more often
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low)
            self._low = low

    def _share(self) -> float:
        """Bytes a second, below which this connection is stuck."""
        return SLOWEST / max(1, len(self.users))

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
        return self._start == self._end and not self._is_readable()

    def _is_readable(self) -> bool:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close the socket."""
        self.users.discard(self)
        self._sock.close()

    def _receive(self, target: memoryview) -> int:
        n = self._move(self._receive_some, target)
        if n == 0:
            raise StorageError("the server closed the connection")
        self.on_progress()
        return n

    def _receive_some(self, target: memoryview) -> int:
        """What has come when the patience ends counts, though it is less than was waited for."""
        try:
            return self._sock.recv_into(target)
        except TimeoutError:
            self._wait_for(1)
            if not self._is_readable():
                raise
            return self._sock.recv_into(target)

    def _move(self, step: Callable[..., int], what: object) -> int:
        """How many bytes one system call moved; the patience grows with them."""
        share = self._share()  # others may have ended in the middle of it
        try:
            moved = step(what)
            now = time.monotonic()
        except TimeoutError:
            now, moved = self._deadline + 1.0, 0
        self._moved_at = now
        share = min(share, self._share())
        self._deadline = min(now + self._patience, self._deadline + moved / share)
        if now > self._deadline:
            raise TimeoutError(f"no answer within {self._patience:.3g} s")
        return moved


W = TypeVar("W", bound=Wire)


class Pool(Generic[W]):
    """Connections by server. Thread-safe."""

    def __init__(self, dial: Callable[[Address, float], W]) -> None:
        """`dial`: makes a connection to a server, within a number of seconds."""
        self._dial = dial
        self.on_progress: Callable[[], None] = lambda: None
        """Called when bytes came over any."""
        self._used: set[Wire] = set()
        """Those that somebody has taken, and neither given back nor closed."""
        self._idle: dict[Address, list[W]] = defaultdict(list)
        self._lock = threading.Lock()
        self._closed = False

    def take(self, address: Address, timeout: float) -> W:
        """A connection for the caller alone."""
        wire = self._idle_one(address) or self._dial(address, timeout)
        with self._lock:
            self._used.add(wire)
        wire.users, wire.on_progress = self._used, self.on_progress
        return wire

    def _idle_one(self, address: Address) -> W | None:
        while True:
            with self._lock:
                if not self._idle[address]:
                    return None
                wire = self._idle[address].pop()
            if wire.is_quiet():
                return wire
            wire.close()  # the server closed it, or says what nobody asked

    def give(self, wire: W) -> None:
        """Hand a connection back on which everything is answered."""
        with self._lock:
            self._used.discard(wire)
            idle = self._idle[wire.address]
            if not self._closed and len(idle) < _KEPT:
                idle.append(wire)
                return
        wire.close()

    @contextlib.contextmanager
    def taken(self, address: Address, timeout: float) -> Iterator[W]:
        """A connection for one question; closed, with all that are idle, where that fails."""
        wire = self.take(address, timeout)
        try:
            yield wire
        except BaseException:
            wire.close()
            self.distrust(address)
            raise
        self.give(wire)

    def distrust(self, address: Address) -> None:
        """After a failure every connection to a server is suspect."""
        with self._lock:
            wires = self._idle.pop(address, [])
        for wire in wires:
            wire.close()

    def close(self) -> None:
        """Close what is idle now, and the rest when it is given back."""
        self._closed = True
        for address in list(self._idle):
            self.distrust(address)


class Lane(Generic[W]):
    """One connection's share of a batch: what is to be asked, and what waits for its answer."""

    def __init__(
        self,
        wire: W,
        waiting: Iterable[int],
        request: Callable[[int], Sequence[Buffer]],
        ahead: int,
    ) -> None:
        """`request`: the command for a place in the batch. `ahead`: how many may be under way."""
        self.wire = wire
        self.ahead = ahead
        self.goes_on = False
        """Whether the next answer is a part of what the last one was: the patience is, too."""
        self._waiting = deque(waiting)
        self._asked: deque[int] = deque()
        self._request = request

    def fill(self) -> None:
        """Ask for as many as may be under way, once half of them are answered."""
        if len(self._asked) > self.ahead // 2:
            return
        parts: list[Buffer] = []
        while self._waiting and len(self._asked) < self.ahead:
            i = self._waiting.popleft()
            parts += self._request(i)
            self._asked.append(i)
        if parts:
            self.wire.send(parts)

    def next(self, timeout: float) -> tuple[int, bytes]:
        """Which is answered next, and the first line of its answer."""
        if self.goes_on:
            self.wire.go_on()
        else:
            self.wire.begin(timeout)
        line = self.wire.line()
        return self._asked.popleft(), line

    @property
    def is_done(self) -> bool:
        """Whether everything is answered."""
        return not self._asked
