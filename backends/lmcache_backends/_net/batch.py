"""Batches of commands, spread over servers, that follow each other without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from lmcache_backends._net.connection import Buffer, Connection, Pool
from lmcache_backends._net.options import Address
from lmcache_core.backend import DeadlineExceeded, StorageError, Transfer

C = TypeVar("C", bound=Connection)
T = TypeVar("T")

FEW, MANY = 2, 4096
"""Commands that may be under way on one connection: of those whose answers are large, at least,
and of those whose answers are short."""

LARGE = 1
"""As `ahead`, where it is the commands that are large."""


class Pipeline(Generic[C]):
    """One connection's share of a batch: what is to be asked, and what waits for its answer."""

    def __init__(
        self,
        connection: C,
        waiting: Iterable[int],
        request: Callable[[int], Sequence[Buffer]],
        ahead: int,
    ) -> None:
        """`request`: the command for an index in the batch. `ahead`: bytes of answers that may be
        under way; 0 where answers are short."""
        self.connection = connection
        self._waiting = deque(waiting)
        self._asked: deque[int] = deque()
        self._request, self._ahead = request, ahead
        self._answered, self._before = 0, connection.received

    def fill(self) -> None:
        """Ask for as many as may be under way, once half of them are answered."""
        depth = self._depth()
        if len(self._asked) > depth // 2:
            return
        parts: list[Buffer] = []
        while self._waiting and len(self._asked) < depth:
            i = self._waiting.popleft()
            parts += self._request(i)
            self._asked.append(i)
        if parts:
            self.connection.send(parts)

    def _depth(self) -> int:
        if not self._ahead:
            return MANY
        each = (self.connection.received - self._before) // max(1, self._answered)
        return max(FEW, min(MANY, self._ahead // each)) if each else FEW

    def next(self) -> tuple[int, bytes]:
        """Which is answered next, and the first line of its answer."""
        line = self.connection.line()
        self._answered += 1
        return self._asked.popleft(), line

    @property
    def is_done(self) -> bool:
        """Whether everything is answered."""
        return not self._asked


class Servers(Generic[C]):
    """The servers of a store, asked together."""

    def __init__(self, pool: Pool[C]) -> None:
        self.pool = pool

    def failed(self, address: Address, error: Exception) -> None:
        """A server failed; raise where the others are of no use without it."""
        raise error

    def worked(self, address: Address) -> None:
        """A server answered its share of a batch."""

    def is_out(self, address: Address) -> bool:
        """Whether a server is not even to be asked."""
        return False

    def silence(self, transfer: Transfer) -> float:
        """Seconds of silence that one server may keep."""
        return transfer.timeout

    def batch(
        self,
        shares: Mapping[Address, Sequence[int]],
        request: Callable[[int], Sequence[Buffer]],
        answer: Callable[[C, int, bytes], T],
        transfer: Transfer,
        ahead: int = 0,
    ) -> Iterator[tuple[int, T]]:
        """Send a request for each index to its server, and yield (index, answer) as they come.

        `answer`: what the connection's next answer, which begins with this line, says. What a
        server that fails should have answered is left out; raises where all fail.
        """
        running: deque[Pipeline[C]] = deque()
        failures: list[Exception] = []
        try:
            for address, share in shares.items():
                if self.is_out(address):
                    failures.append(StorageError(f"{address} is left out"))
                    continue
                try:
                    connection = self.pool.take(address, transfer, self.silence(transfer))
                    running.append(Pipeline(connection, share, request, ahead))
                    running[-1].fill()
                except Exception as error:
                    failures.append(self._drop(running, address, error, transfer))
            while running:
                pipeline = running[0]
                try:
                    i, line = pipeline.next()
                    got = answer(pipeline.connection, i, line)
                    pipeline.fill()
                except Exception as error:
                    address = pipeline.connection.address
                    failures.append(self._drop(running, address, error, transfer))
                    continue
                self._turn(running)
                yield i, got
                del got
        finally:
            for pipeline in running:
                pipeline.connection.close()
        if failures and len(failures) == len(shares):
            raise failures[0]

    def _turn(self, running: deque[Pipeline[C]]) -> None:
        """Go on with the next pipeline."""
        if not running[0].is_done:
            return running.rotate(-1)
        connection = running.popleft().connection
        self.pool.give(connection)
        self.worked(connection.address)

    def _drop(
        self, running: deque[Pipeline[C]], address: Address, error: Exception, transfer: Transfer
    ) -> Exception:
        """Go on without this server, if there is time; returns what to raise if it was the last."""
        for pipeline in [each for each in running if each.connection.address == address]:
            running.remove(pipeline)
            pipeline.connection.close()
        self.pool.distrust(address)
        error = placed(error, address)
        self.failed(address, error)
        if transfer.remaining() <= 0:
            raise error
        return error


def placed(error: Exception, address: Address) -> Exception:
    """An error that says where."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # of the system's
        text = error.strerror
    text = text if str(address) in text else f"{address}: {text or type(error).__name__}"
    if isinstance(error, StorageError):
        error.args = (text,)
        return error
    return (DeadlineExceeded if isinstance(error, TimeoutError) else StorageError)(text)


class Assembly:
    """Values that come in pieces: each is allocated with its first piece and handed out with its
    last, unless one of them is missing."""

    def __init__(
        self, sizes: Mapping[int, int], pieces: Sequence[tuple[int, int, int]], transfer: Transfer
    ) -> None:
        """`sizes`: bytes of each value, by index. `pieces`: (index, begin, end)."""
        self._sizes, self._pieces, self._transfer = sizes, pieces, transfer
        self._left = dict.fromkeys(sizes, 0)
        for i, _, _ in pieces:
            self._left[i] += 1
        self._buffers: dict[int, memoryview] = {}
        self.torn: set[int] = set()
        """Indices of values that miss a piece."""

    def target(self, n: int) -> memoryview:
        """Where to read piece `n` into."""
        i, begin, end = self._pieces[n]
        if i not in self._buffers:
            self._buffers[i] = self._transfer.allocate(self._sizes[i])
        return self._buffers[i][begin:end]

    def miss(self, n: int) -> None:
        """There is no piece `n`."""
        self.torn.add(self._pieces[n][0])

    def take(self, n: int) -> tuple[int, memoryview] | None:
        """After piece `n`: (index, value) where that was the last and all are there."""
        i = self._pieces[n][0]
        self._left[i] -= 1
        if self._left[i]:
            return None
        buffer = self._buffers.pop(i, None)
        return None if buffer is None or i in self.torn else (i, buffer)
