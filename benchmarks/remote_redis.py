"""Redis for bench-remote: a bare loop over a socket, and redis-py as it comes."""

from __future__ import annotations

from collections.abc import Sequence

import redis
from remote_bare import Loop


class Bare(Loop):
    """GET, SET and EXISTS."""

    header = b"$%d\r\n"
    taken = b"+OK\r\n"
    there = b":1\r\n"

    def get(self, name: bytes) -> bytes:
        """GET."""
        return b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name)

    def set(self, name: bytes, nbytes: int) -> bytes:
        """SET."""
        return b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, nbytes)

    def has(self, name: bytes) -> bytes:
        """EXISTS."""
        return b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n%b\r\n" % (len(name), name)


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
