"""Real servers on free loopback ports, and a proxy that does to a connection what networks do."""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PATIENCE = 30.0
"""Seconds that a server may take to start or stop."""


def program(name: str) -> str:
    """The path of a server's program; an error that says what to install where there is none."""
    beside_python = Path(sys.executable).with_name(name)
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed; .ci/servers says how to get it")
    return found


_GIVEN: set[int] = set()


def free_port() -> int:
    """A loopback port that nobody listens on, another one each time. Below those that the kernel
    gives to connections, so that none takes it before its server does."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        if port in _GIVEN:
            continue
        _GIVEN.add(port)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Server:
    """A server process. `ready` is asked until it is true, or raises nothing."""

    def __init__(
        self, command: Sequence[str], ready: Callable[[], object], log: Path | None = None
    ) -> None:
        self._command, self._ready, self._log = list(command), ready, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, or start again, and wait until it answers."""
        with open(self._log or os.devnull, "ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(Exception):
                self._ready()
                return
            if self._process.poll() is not None or time.monotonic() > end:
                text = self._log.read_text()[-2000:] if self._log else ""
                self.kill()
                raise RuntimeError(f"did not start: {' '.join(self._command)}\n{text}")
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9, as power cuts and the OOM killer do."""
        if self._process is not None:
            self.thaw()
            self._process.kill()
            self._process.wait(PATIENCE)
            self._process = None

    def freeze(self) -> None:
        """Stop it in the middle of whatever it does; the kernel goes on accepting for it."""
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # until all its threads stand still

    def thaw(self) -> None:
        """Let it go on."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGCONT)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Start a server and kill it at the end."""
    server.start()
    try:
        yield server
    finally:
        server.kill()


def answers(port: int, request: bytes, reply: bytes) -> Callable[[], None]:
    """A `ready` for `Server`: the port takes a request and the answer begins with `reply`."""

    def ready() -> None:
        with socket.create_connection(("127.0.0.1", port), 1.0) as sock:
            sock.sendall(request)
            got = sock.recv(len(reply), socket.MSG_WAITALL)
            if got != reply:
                raise RuntimeError(f"{got!r}")

    return ready


def eventually(what: Callable[[], object]) -> None:
    """Wait until `what` is true and raises nothing."""
    end = time.monotonic() + PATIENCE
    while True:
        failure: Exception | None = None
        try:
            if what():
                return
        except Exception as error:
            failure = error
        if time.monotonic() > end:
            raise AssertionError(f"never became true: {what}") from failure
        time.sleep(0.02)


class Proxy:
    """A TCP proxy on a loopback port; what it does to the bytes that come back can be changed.

    cut_after: bytes after which a connection is cut, in the middle of whatever it is.
    stall_after: bytes after which nothing comes any more, while the connection stays open.
    garble_at: (offset, bytes): put these in the place of what the server sent.
    rate: bytes a second.
    mute: how many connections, the next that are in the middle of a large answer, never bring
    anything again.
    Bytes are counted for each connection, from its beginning or from when the fault was set.
    """

    def __init__(self, port: int) -> None:
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.garble_at: tuple[int, bytes] | None = None
        self.rate: float | None = None
        self.mute = 0
        self._muting = threading.Lock()
        self.connections = 0
        self.asked = 0
        """Bytes that clients sent, over all connections."""
        self.answered = 0
        """Bytes that the server sent."""
        self.round_trips = 0
        """Times that a client sent something after the server had."""
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def heal(self) -> None:
        """Behave, from now on."""
        self.cut_after = self.stall_after = self.garble_at = self.rate = None

    def close(self) -> None:
        """Cut everything."""
        self._closing.set()
        for thread in list(self._threads):
            thread.join(PATIENCE)
        for sock in self._open:
            sock.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            if not select.select([self._listener], [], [], 0.05)[0]:
                continue
            client, _ = self._listener.accept()
            self.connections += 1
            thread = threading.Thread(target=self._relay, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _relay(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            server = socket.create_connection(("127.0.0.1", self._target), 5.0)
            with server:
                self._pump(client, server)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        passed, faults, mute, row = 0, self._faults(), False, 0
        speaking: socket.socket = server
        while not self._closing.is_set():
            if faults != self._faults():
                passed, faults = 0, self._faults()
            stalled = mute or (self.stall_after is not None and passed >= self.stall_after)
            for sock in select.select([client] if stalled else [client, server], [], [], 0.05)[0]:
                if row > 100_000 and self._is_muted_now():
                    mute = True
                    break
                data = sock.recv(self._portion(passed) if sock is server else 1 << 16)
                if not data:
                    return
                if sock is client:
                    self.asked += len(data)
                    self.round_trips += speaking is server
                row = 0 if sock is client else row + len(data)
                speaking = sock
                if sock is client:
                    server.sendall(data)
                    continue
                self.answered += len(data)  # before the client can look
                client.sendall(self._changed(data, passed))
                passed += len(data)
                if self.cut_after is not None and passed >= self.cut_after:
                    return
                if self.rate is not None:
                    self._closing.wait(len(data) / self.rate)

    def _is_muted_now(self) -> bool:
        with self._muting:
            muted = self.mute > 0
            self.mute -= muted
        return muted

    def _faults(self) -> tuple[object, ...]:
        return self.cut_after, self.stall_after, self.garble_at

    def _portion(self, passed: int) -> int:
        """How many bytes to take next, so that a fault comes at its very byte."""
        limits = [n - passed for n in (self.cut_after, self.stall_after) if n is not None]
        if self.rate is not None:
            limits.append(int(self.rate / 20) or 1)
        return max(1, min([1 << 16, *limits]))

    def _changed(self, data: bytes, passed: int) -> bytes:
        if self.garble_at is None:
            return data
        offset, garbage = self.garble_at
        first = max(0, offset - passed)
        last = min(len(data), offset + len(garbage) - passed)
        if first >= last:
            return data
        start = passed + first - offset
        return data[:first] + garbage[start : start + last - first] + data[last:]
