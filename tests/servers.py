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

    @property
    def running(self) -> bool:
        """Whether it was started and not killed."""
        return self._process is not None

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
    delay: seconds before each answer.
    largest: bytes of an answer that still come through; a larger one stops there, and so does its
    connection, as where large packets are lost.
    says: what is sent in the place of any answer, as another kind of server would.
    first: what is sent before the first answer of a connection, which nobody asked for.
    mute: how many connections, the next that are in the middle of a large answer, never bring
    anything again.
    Bytes are counted for each connection, from its beginning or from when the fault was set.
    """

    def __init__(self, port: int) -> None:
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.garble_at: tuple[int, bytes] | None = None
        self.rate: float | None = None
        self.delay = 0.0
        self.largest: int | None = None
        self.says: bytes | None = None
        self.first: bytes | None = None
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
        self._listener: socket.socket | None = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._accepting = threading.Lock()
        self._dark: list[socket.socket] = []
        """Sockets that keep new connections from being answered."""
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def heal(self) -> None:
        """Behave, from now on."""
        self.cut_after = self.stall_after = self.garble_at = self.rate = None
        self.largest = self.says = self.first = None
        self.delay = 0.0
        for sock in self._dark:
            sock.close()
        self._dark = []
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))

    def refuse(self) -> None:
        """Cut what is connected, and listen no more."""
        self._hang_up()
        self.cut_after = 0

    def darken(self) -> None:
        """What is connected falls silent, and no new connection is ever answered: packets go
        nowhere."""
        self._hang_up()
        self.stall_after = 0
        listener = socket.create_server(("127.0.0.1", self.port), backlog=0)
        self._dark.append(listener)
        for _ in range(3):  # fill the queue of connections that nobody accepts
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", self.port))
            self._dark.append(sock)

    def close(self) -> None:
        """Cut everything."""
        self._closing.set()
        for thread in list(self._threads):
            thread.join(PATIENCE)
        self._hang_up()
        for sock in self._dark:
            sock.close()

    def _hang_up(self) -> None:
        with self._accepting:
            if self._listener is not None:
                self._listener.close()
            self._listener = None

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            client = self._next_client()
            if client is None:
                self._closing.wait(0.001)
                continue
            self.connections += 1
            thread = threading.Thread(target=self._relay, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _next_client(self) -> socket.socket | None:
        with self._accepting:
            listener = self._listener
            if listener is None or not select.select([listener], [], [], 0.05)[0]:
                return None
            return listener.accept()[0]

    def _relay(self, client: socket.socket) -> None:
        target = ("127.0.0.1", self._target)
        with client, contextlib.suppress(OSError), socket.create_connection(target, 5.0) as server:
            _Relayed(self, client, server).pump()

    def _is_muted_now(self) -> bool:
        with self._muting:
            muted = self.mute > 0
            self.mute -= muted
        return muted

    def _faults(self) -> tuple[object, ...]:
        return self.cut_after, self.stall_after, self.garble_at, self.first


class _Relayed:
    """One connection through a proxy."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._faults = proxy._faults()
        self._passed = 0
        """Bytes from the server, since the fault was set."""
        self._row = 0
        """Bytes of the answer that is under way."""
        self._mute = self._answered = False
        self._heard = True
        """Whether the server spoke last."""

    def pump(self) -> None:
        """Pass on what comes, until either side or a fault ends it."""
        proxy, going_on = self._proxy, True
        while going_on and not proxy._closing.is_set():
            if self._faults != proxy._faults():
                self._passed, self._faults, self._answered = 0, proxy._faults(), False
            if proxy.cut_after is not None and self._passed >= proxy.cut_after:
                return
            both = [self._client] if self._stalled() else [self._client, self._server]
            for sock in select.select(both, [], [], 0.05)[0]:
                going_on = self._asks() if sock is self._client else self._answers()
                if not going_on:
                    break

    def _stalled(self) -> bool:
        proxy = self._proxy
        if self._row > 100_000 and not self._mute:
            self._mute = proxy._is_muted_now()
        if proxy.largest is not None and self._row >= proxy.largest:
            self._mute = True
        return self._mute or (proxy.stall_after is not None and self._passed >= proxy.stall_after)

    def _asks(self) -> bool:
        proxy, data = self._proxy, self._client.recv(1 << 16)
        proxy.asked += len(data)
        proxy.round_trips += self._heard
        self._row, self._heard = 0, False
        if proxy.says is None:
            self._server.sendall(data)
        else:
            self._client.sendall(proxy.says)
        return bool(data)

    def _answers(self) -> bool:
        proxy, data = self._proxy, self._server.recv(self._portion())
        if self._row == 0:
            proxy._closing.wait(proxy.delay)
        if proxy.first is not None and not self._answered:
            self._client.sendall(proxy.first)
        proxy.answered += len(data)  # before the client can look
        self._client.sendall(self._changed(data))
        self._row += len(data)
        self._answered = self._heard = True
        self._passed += len(data)
        if proxy.rate is not None:
            proxy._closing.wait(len(data) / proxy.rate)
        return bool(data)

    def _portion(self) -> int:
        """How many bytes to take next, so that a fault comes at its very byte."""
        proxy = self._proxy
        limits = [n - self._passed for n in (proxy.cut_after, proxy.stall_after) if n is not None]
        if proxy.largest is not None:
            limits.append(proxy.largest - self._row)
        if proxy.rate is not None:
            limits.append(int(proxy.rate / 20) or 1)
        return max(1, min([1 << 16, *limits]))

    def _changed(self, data: bytes) -> bytes:
        if self._proxy.garble_at is None:
            return data
        offset, garbage = self._proxy.garble_at
        first = max(0, offset - self._passed)
        last = min(len(data), offset + len(garbage) - self._passed)
        if first >= last:
            return data
        start = self._passed + first - offset
        return data[:first] + garbage[start : start + last - first] + data[last:]
