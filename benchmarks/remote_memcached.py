"""memcached for bench-remote: a bare loop over a socket, and pymemcache as it comes."""

from __future__ import annotations

from collections.abc import Sequence

from pymemcache.client.base import Client
from remote_bare import Loop


class Bare(Loop):
    """Meta commands."""

    header = b"VA %d\r\n"
    taken = there = b"HD\r\n"

    def get(self, name: bytes) -> bytes:
        """With its value, and nothing else."""
        return b"mg %b v\r\n" % name

    def set(self, name: bytes, nbytes: int) -> bytes:
        """Whatever was there."""
        return b"ms %b %d\r\n" % (name, nbytes)

    def has(self, name: bytes) -> bytes:
        """Without its value."""
        return b"mg %b\r\n" % name


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
