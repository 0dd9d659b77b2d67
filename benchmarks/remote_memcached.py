"""memcached for bench-remote: bare loops over a socket, and pymemcache as it comes."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from pymemcache.client.base import Client


class Bare:
    """One socket: recv_into and sendmsg loops that know what comes. Two values are under way."""

    def __init__(self, port: int) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.settimeout(20.0)
        self._targets = [memoryview(bytearray(16 << 20)) for _ in range(4)]
        self._small = memoryview(bytearray(64))
        self._nbytes = 0

    def load(self, names: Sequence[bytes]) -> None:
        """Get every key into memory in use; all have the size that was stored last."""
        header = len(b"VA %d\r\n" % self._nbytes)
        asks = [b"mg %b v\r\n" % name for name in names]
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
        for number, name in enumerate(names):
            if number >= 2:
                self._fill(self._small[:4])
            begin = b"ms %b %d\r\n" % (name, len(value))
            self._send([memoryview(begin), memoryview(value), memoryview(b"\r\n")])
        for _ in names[-2:]:
            self._fill(self._small[:4])

    def lookup(self, names: Sequence[bytes]) -> None:
        """Ask for every key without its value, in one go."""
        self._sock.sendall(b"".join(b"mg %b\r\n" % name for name in names))
        self._fill(self._targets[0][: 4 * len(names)])

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


class Stock:
    """pymemcache's own client. It can only look up by fetching."""

    def __init__(self, port: int) -> None:
        self._client = Client(("127.0.0.1", port))

    def load(self, names: Sequence[bytes]) -> None:
        """Get every key."""
        for name in names:
            self._client.get(name)

    def store(self, names: Sequence[bytes], value: bytes) -> None:
        """Set every key to `value`."""
        for name in names:
            self._client.set(name, value, noreply=False)

    def lookup(self, names: Sequence[bytes]) -> None:
        """Fetch all keys at once."""
        self._client.get_many(names)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
