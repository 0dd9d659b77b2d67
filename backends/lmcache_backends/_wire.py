"""What the network backends share: a socket with deadlines, and the options of a shared store."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from lmcache_core import Duration, Options, StorageError

SLOWEST = 16 << 20
"""Bytes a second: what moves slower than this counts as stuck, as it does for a tier."""
_IOV_MAX = 1024
_SMALL = 16 << 10
"""Bytes of the buffer that replies are read through, and of parts that TLS sends together."""

Prefix = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
"""What the keys of one deployment begin with, so that several share a server."""

Buffer = bytes | memoryview


class Tls(Options):
    """`ca`: a file of certificates to trust instead of the system's. `cert`, `key`: files of the
    client's own certificate. `check_hostname`: whether the server's must name the host."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    check_hostname: bool = True


class Expiry(Options):
    """`ttl`: after how long a chunk is forgotten; never unless given. `refresh`: a use begins it
    anew."""

    ttl: Duration | None = None
    refresh: bool = False

    @model_validator(mode="after")
    def _ttl_to_refresh(self) -> Expiry:
        if self.refresh and self.ttl is None:
            raise ValueError("refresh needs a ttl")
        return self


class Wire:
    """A connected stream socket.

    Payloads are read straight into their destination and written from where they lie; short
    replies go through a buffer. Nothing waits for longer than the patience that `begin` sets,
    which grows with what moves. Raises TimeoutError when it ends, StorageError when the other
    side closes or says what it should not, OSError for the rest.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._bytes = bytearray(_SMALL)
        self._buffer = memoryview(self._bytes)
        self._start = self._end = 0
        self._deadline = self._patience = 0.0

    def begin(self, timeout: float) -> None:
        """From now on, wait for at most `timeout` seconds, and longer only for what moves."""
        self._patience = timeout
        self._deadline = time.monotonic() + timeout

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

    def line(self) -> bytes:
        """The next line, without its CR LF."""
        while (at := self._bytes.find(b"\r\n", self._start, self._end)) < 0:
            self._make_room()
            self._end += self._receive(self._buffer[self._end :])
        line = bytes(self._buffer[self._start : at])
        self._start = at + 2
        return line

    def _make_room(self) -> None:
        """Move what is buffered to the front, so that more can be read behind it."""
        rest = bytes(self._buffer[self._start : self._end])
        self._buffer[: len(rest)] = rest
        self._start, self._end = 0, len(rest)
        if len(rest) == _SMALL:
            raise StorageError("the answer is not what the protocol says: a line without an end")

    def read_into(self, target: memoryview) -> None:
        """Fill `target` with what comes next."""
        ready = min(self._end - self._start, target.nbytes)
        target[:ready] = self._buffer[self._start : self._start + ready]
        self._start += ready
        while ready < target.nbytes:
            ready += self._receive(target[ready:])

    def expect(self, text: bytes) -> None:
        """Read `text`; raises StorageError where something else comes."""
        got = bytearray(len(text))
        self.read_into(memoryview(got))
        if got != text:
            raise StorageError("the answer is not what the protocol says: a value of another size")

    def is_quiet(self) -> bool:
        """Whether the other side is still there and says nothing unasked."""
        if self._start != self._end:
            return False
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _receive(self, target: memoryview) -> int:
        n = self._move(self._sock.recv_into, target)
        if n == 0:
            raise StorageError("the server closed the connection")
        return n

    def _move(self, step: Callable[..., int], what: object) -> int:
        """How many bytes one system call moved; the patience grows with them."""
        left = self._deadline - time.monotonic()
        if left > 0:
            self._sock.settimeout(left)
            with contextlib.suppress(TimeoutError):
                moved = step(what)
                latest = time.monotonic() + self._patience
                self._deadline = min(latest, self._deadline + moved / SLOWEST)
                return moved
        raise TimeoutError(f"no answer within {self._patience:.3g} s")
