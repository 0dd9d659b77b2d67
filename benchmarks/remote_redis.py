"""Redis for bench-remote: bare loops over a socket, and redis-py as it comes."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import redis


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
        """GET every key into memory in use; all have the size that was stored last."""
        header = len(b"$%d\r\n" % self._nbytes)
        asks = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name) for name in names]
        self._sock.sendall(b"".join(asks[:2]))
        for number in range(len(names)):
            self._fill(self._small[:header])
            self._fill(self._targets[number % 4][: self._nbytes])
            self._fill(self._small[:2])
            if number + 2 < len(asks):
                self._sock.sendall(asks[number + 2])

    def store(self, names: Sequence[bytes], value: bytes) -> None:
        """SET every key to `value`."""
        self._nbytes = len(value)
        for number, name in enumerate(names):
            if number >= 2:
                self._fill(self._small[:5])
            begin = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, len(value))
            self._send([memoryview(begin), memoryview(value), memoryview(b"\r\n")])
        for _ in names[-2:]:
            self._fill(self._small[:5])

    def lookup(self, names: Sequence[bytes]) -> None:
        """EXISTS for every key, in one go."""
        asks = [b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n%b\r\n" % (len(name), name) for name in names]
        self._sock.sendall(b"".join(asks))
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
    """redis-py's own client; hiredis parses where it is installed."""

    def __init__(self, port: int) -> None:
        self._client = redis.Redis(port=port)

    def load(self, names: Sequence[bytes]) -> None:
        """GET every key."""
        for name in names:
            self._client.get(name)

    def store(self, names: Sequence[bytes], value: bytes) -> None:
        """SET every key to `value`."""
        for name in names:
            self._client.set(name, value)

    def lookup(self, names: Sequence[bytes]) -> None:
        """EXISTS for every key, in a pipeline."""
        with self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.exists(name)
            pipeline.execute()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
