"""Transfer: the clock of one call to a store. It tells a store that is slow, or busy with other
calls, from one that hangs.

What is transferred to and from one store shares a `Line`. A call has had its time when, while
somebody waited for it,

- nothing moved on the line for `timeout` seconds; or
- `timeout` seconds passed beyond those that all that moved on the line takes at SLOWEST: the store
  trickles; or
- as much passed of the call's fair share of the time, beyond what its own bytes take: it hangs
  among others that flow. While n calls wait, each second counts for each as the nth part of one.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from lmcache_core.errors import DeadlineExceeded, StorageError
from lmcache_core.io.clock import SharedClock
from lmcache_core.io.memory import HOST

SLOWEST = 16 << 20
"""Bytes a second. What moves more slowly, over all that share a line, counts as failing."""


class Line:
    """What the transfers of one store share: who waits, and what moved when."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a forgotten load may be collected while it is held
        self.clock = SharedClock()
        """Its users are the transfers that somebody waits for."""
        self.moved = 0
        """Bytes, of all transfers."""
        self.moved_at = 0.0
        """When something last did, on the wall's clock."""

    def __repr__(self) -> str:
        return f"<Line: {self.clock.users} wait, {self.moved} bytes moved>"


class Transfer:
    """One call's clock, its destination, and what it made leave. Thread-safe: all streams of one
    load share one.

    A backend waits for at most `timeout` seconds of silence and reads into what `allocate` gives;
    one that can tell how much of a large frame has come or gone says so with `moved`.
    """

    def __init__(
        self,
        timeout: float,
        line: Line | None = None,
        *,
        limit: int = sys.maxsize,
        waits: bool = True,
    ) -> None:
        """`line`: what the call shares with others; nothing unless given. `limit`: bytes of the
        largest frame. `waits`: the time of the call counts from now on."""
        self.timeout = timeout
        """Seconds of silence that the store may keep."""
        self.evicted: list[bytes] = []
        """Keys of what the store removed to make room; the backend adds them."""
        self.answer = ""
        """What the store said last, if that is why it is late, such as that it is busy."""
        self.limit = limit
        """Bytes of the largest frame. What claims to be larger is none: hand on an empty one, which
        the tier finds to be damaged, and removes."""
        self._line = Line() if line is None else line
        self._promised = 0
        self._tells = False
        """Whether the backend says what moves. Where it does not, what is promised may come in
        silence, as long as it would take at SLOWEST."""
        self._waits = self._over = False
        self._alone = self._shared = 0.0
        """Seconds waited, less what all that moved may take; shared seconds, less its own."""
        self._since = self._at = self._shared_at = 0.0
        self._line_moved = 0
        if waits:
            self.wait()

    def __repr__(self) -> str:
        return f"<Transfer: {self.remaining():.3g} s left of {self.timeout:.3g} s>"

    # For backends

    def allocate(self, nbytes: int) -> memoryview:
        """A writable buffer of exactly that size, to read a frame into; on any thread.

        Raises StorageError for more than any frame has.
        """
        if nbytes > self.limit:
            raise StorageError(f"a frame of {nbytes} bytes; none has more than {self.limit}")
        self.promise(nbytes)
        return HOST.allocate(nbytes)

    def moved(self, nbytes: int) -> None:
        """So many bytes came or went. Raises DeadlineExceeded when the call has had its time."""
        with self._line.lock:
            self._tells = True
            self._earn(nbytes)
            left = self._left()
        if left <= 0:
            raise self.late()

    def remaining(self) -> float:
        """Seconds after which the call has had its time, if nothing moves until then."""
        with self._line.lock:
            self._count()
            return self._left()

    def check(self) -> None:
        """Raise DeadlineExceeded when the call has had its time."""
        if self.remaining() <= 0:
            raise self.late()

    def late(self) -> DeadlineExceeded:
        """The end of a call that has had its time, and the error that says so."""
        self._over = True
        seconds = f"{self.timeout:.3g} s"
        if self.answer:
            return DeadlineExceeded(f"{self.answer}, for {seconds}")
        return DeadlineExceeded(f"no answer within {seconds}")

    # For who calls them

    def promise(self, nbytes: int) -> None:
        """So many bytes begin to come or go."""
        with self._line.lock:
            self._promised += nbytes

    def arrived(self, nbytes: int) -> None:
        """A whole frame of so many bytes is there, whether or not the backend told of its bytes."""
        with self._line.lock:
            self._promised = max(0, self._promised - nbytes)
            self._earn(0 if self._tells else nbytes)

    def decoded(self, nbytes: int) -> None:
        """A frame became so many bytes more: that took time, too."""
        with self._line.lock:
            self._earn(nbytes)

    def wait(self) -> None:
        """Somebody waits for the store from now on."""
        with self._line.lock:
            self._since = self._at = time.monotonic()
            self._shared_at = self._line.clock.enter()
            self._line_moved = self._line.moved
            self._waits = True

    def pause(self) -> None:
        """Nobody waits for the store any more, for now: who calls has other things to do."""
        with self._line.lock:
            if self._waits:
                self._count()
                self._line.clock.leave()
                self._waits = False

    def end(self) -> None:
        """Nobody wants it any more: who still works for it is to stop."""
        self._over = True
        self.pause()  # who waited may have been interrupted

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, somebody waits for the store."""
        self.wait()
        try:
            yield
        finally:
            self.pause()

    # With the line's lock held

    def _earn(self, nbytes: int) -> None:
        self._count()
        self._line.moved += nbytes
        self._line.moved_at = self._at
        self._shared = max(0.0, self._shared - nbytes / SLOWEST)

    def _count(self) -> None:
        """Bring both accounts up to now."""
        line, now, before = self._line, time.monotonic(), self._at
        self._at = now
        if not self._waits:
            return
        shared = line.clock.now()
        self._shared += shared - self._shared_at
        self._alone = max(0.0, self._alone + now - before - self._unseen() / SLOWEST)
        self._shared_at, self._line_moved = shared, line.moved

    def _unseen(self) -> int:
        return self._line.moved - self._line_moved

    def _left(self) -> float:
        if self._over:
            return 0.0
        if not self._waits:
            return self.timeout
        silent = self._at - max(self._since, self._line.moved_at)
        alone = self._alone - self._unseen() / SLOWEST
        left = min(self.timeout - silent, self.timeout - max(0.0, alone))
        left = min(left, (self.timeout - self._shared) * self._line.clock.users)
        return left if self._tells else left + self._promised / SLOWEST
