"""The bare loop of bench-remote over a socket, whatever the protocol."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence


class Loop(ABC):
    """recv_into and sendmsg loops that know what comes. Two values are under way."""

    header: bytes
    """What comes before a value, given its size."""
    taken: bytes
    """The answer to a store."""
    there: bytes
    """The answer to a lookup."""

    def __init__(self, port: int) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.settimeout(20.0)
        self._targets = [memoryview(bytearray(16 << 20)) for _ in range(4)]
        self._small = memoryview(bytearray(64))
        self._nbytes = 0

    @abstractmethod
    def get(self, name: bytes) -> bytes:
        """The command that loads."""

    @abstractmethod
    def set(self, name: bytes, nbytes: int) -> bytes:
        """The command that stores, up to the value."""

    @abstractmethod
    def has(self, name: bytes) -> bytes:
        """The command that looks up."""

    def load(self, names: Sequence[bytes]) -> None:
        """Get every key into memory in use; all have the size that was stored last."""
        header = len(self.header % self._nbytes)
        asks = [self.get(name) for name in names]
        self._sock.sendall(b"".join(asks[:2]))
        for number in range(len(names)):
            self._fill(self._small[:header])
            self._fill(self._targets[number % 4][: self._nbytes])
            self._fill(self._small[:2])
            if number + 2 < len(asks):
                self._sock.sendall(asks[number + 2])

    def store(self, names: Sequence[bytes], value: bytes) -> None:
        """Set every key to `value`."""
        self._nbytes = len(value)
        taken = self._small[: len(self.taken)]
        for number, name in enumerate(names):
            if number >= 2:
                self._fill(taken)
            begin = self.set(name, len(value))
            self._send([memoryview(begin), memoryview(value), memoryview(b"\r\n")])
        for _ in names[-2:]:
            self._fill(taken)

    def lookup(self, names: Sequence[bytes]) -> None:
        """Ask for every key without its value, in one go."""
        self._sock.sendall(b"".join(self.has(name) for name in names))
        self._fill(self._targets[0][: len(self.there) * len(names)])

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def _fill(self, target: memoryview) -> None:
        done = 0
        while done < target.nbytes:
            done += self._sock.recv_into(target[done:])

    def _send(self, parts: list[memoryview]) -> None:
        while parts:
            sent = self._sock.sendmsg(parts)
            while parts and sent >= parts[0].nbytes:
                sent -= parts.pop(0).nbytes
            if sent:
                parts[0] = parts[0][sent:]
