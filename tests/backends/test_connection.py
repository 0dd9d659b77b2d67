"""Connection: a socket with the clock of a call, whatever pieces the network makes of what was sent."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_backends._net.connection import Connection, Pool
from lmcache_backends._net.options import Address
from lmcache_core.backend import Transfer
from lmcache_core.errors import StorageError
from lmcache_core.io.transfer import SLOWEST
from tests.certificates import Authority
from tests.servers import eventually

ADDRESS = Address("here", 1)
PIECE = st.binary(min_size=0, max_size=40_000)
KINDS = ("unix", "tcp")


class Counting(socket.socket):
    """Counts how often it is read."""

    reads = 0

    def recv_into(self, *arguments: Any) -> int:
        Counting.reads += 1
        return super().recv_into(*arguments)


@contextlib.contextmanager
def pair(kind: str = "tcp", timeout: float = 5.0) -> Iterator[tuple[Connection, socket.socket]]:
    """A connection and the other end of it."""
    ours, theirs = socket.socketpair() if kind == "unix" else connected()
    with Counting(fileno=ours.detach()) as counting, theirs:
        connection = Connection(counting, ADDRESS)
        connection.use(Transfer(timeout), timeout)
        yield connection, theirs


def connected() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


@contextlib.contextmanager
def sending(sock: socket.socket, data: bytes, cuts: list[int]) -> Iterator[None]:
    """Send `data` in pieces that end at `cuts`."""
    ends = sorted({cut % (len(data) + 1) for cut in cuts} | {len(data)})

    def send() -> None:
        begin = 0
        for end in ends:
            sock.sendall(data[begin:end])
            begin = end

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


@given(
    st.lists(st.one_of(st.text("abc 1$", max_size=60), PIECE), max_size=12),
    st.lists(st.integers(0, 1 << 20), max_size=20),
)
@pytest.mark.parametrize("kind", KINDS)
def test_lines_and_values_come_back_however_they_are_cut(
    kind: str, items: list[str | bytes], cuts: list[int]
) -> None:
    data = b"".join(i if isinstance(i, bytes) else i.encode() + b"\r\n" for i in items)
    with pair(kind) as (connection, theirs), sending(theirs, data, cuts):
        for item in items:
            if isinstance(item, str):
                assert connection.line() == item.encode()
            else:
                target = memoryview(bytearray(len(item)))
                connection.read_into(target)
                assert target == item
        assert connection.is_quiet()


@given(st.lists(PIECE, max_size=2000))
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_sent_in_order(kind: str, parts: list[bytes]) -> None:
    data = b"".join(parts)
    with pair(kind) as (connection, theirs):
        got = bytearray(len(data))
        reader = threading.Thread(target=read_all, args=(theirs, got))
        reader.start()
        connection.send([memoryview(part) for part in parts])
        reader.join()
        assert got == data


def read_all(sock: socket.socket, into: bytearray) -> None:
    done = 0
    while done < len(into):
        done += sock.recv_into(memoryview(into)[done:])


def test_a_line_without_an_end_is_an_error() -> None:
    with pair() as (connection, theirs):
        theirs.sendall(b"x" * 20_000)
        with pytest.raises(StorageError, match="protocol"):
            connection.line()


def test_another_text_than_expected_is_an_error() -> None:
    with pair() as (connection, theirs):
        theirs.sendall(b"\r\nxy")
        connection.expect(b"\r\n")
        with pytest.raises(StorageError, match="protocol"):
            connection.expect(b"\r\n")


def test_the_end_of_the_connection_is_an_error() -> None:
    with pair() as (connection, theirs):
        theirs.sendall(b"half a li")
        theirs.close()
        with pytest.raises(StorageError, match="closed"):
            connection.line()
        assert not connection.is_quiet()


@pytest.mark.parametrize("kind", KINDS)
def test_silence_and_a_full_pipe_cost_the_patience_and_no_more(kind: str) -> None:
    with pair(kind, 0.1) as (connection, _):
        small, large = memoryview(bytearray(4)), memoryview(bytearray(1 << 20))
        for step in (
            connection.line,
            lambda: connection.read_into(small),
            lambda: connection.read_into(large),
        ):
            connection.use(Transfer(0.1), 0.1)
            began = time.monotonic()
            with pytest.raises(TimeoutError, match="no answer"):
                step()
            assert 0.09 < time.monotonic() - began < 0.3
        connection.use(Transfer(0.1), 0.1)
        with pytest.raises(TimeoutError, match="no answer"):
            connection.send([bytes(64 << 20)])


def steady(sock: socket.socket, portion: bytes, pause: float, count: int) -> None:
    with contextlib.suppress(OSError):  # the other side has given up
        for _ in range(count):
            sock.sendall(portion)
            time.sleep(pause)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trickle_is_no_progress(kind: str) -> None:
    """A byte in a while keeps no call alive; SLOWEST bytes a second do."""
    with pair(kind) as (connection, theirs):
        stop = threading.Event()

        def trickle() -> None:
            while not stop.wait(0.01):
                theirs.send(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        connection.use(Transfer(0.2), 0.2)
        with pytest.raises(TimeoutError):
            connection.read_into(memoryview(bytearray(1 << 20)))
        stop.set()
        thread.join()
    for portion, pause in ((bytes(SLOWEST // 10), 0.05), (bytes(SLOWEST // 100), 0.005)):
        count = SLOWEST * 4 // 5 // len(portion)
        with pair(kind) as (connection, theirs):
            thread = threading.Thread(target=steady, args=(theirs, portion, pause, count))
            thread.start()
            connection.use(Transfer(0.2), 0.2)  # less than it takes in all
            connection.read_into(memoryview(bytearray(len(portion) * count)))
            thread.join()


def test_a_value_that_comes_in_many_packets_wakes_its_reader_a_few_times() -> None:
    """Each time costs a turn at a core, and one at the interpreter."""
    portion, count = random.Random(3).randbytes(64 << 10), 64
    with pair() as (connection, theirs):
        thread = threading.Thread(target=steady, args=(theirs, portion, 0.001, count))
        thread.start()
        target = memoryview(bytearray(len(portion) * count))
        Counting.reads = 0
        connection.read_into(target)
        assert Counting.reads <= 20
        assert target == portion * count
        thread.join()
        assert connection.is_quiet()
        theirs.sendall(b"+")  # a single byte is noticed again
        eventually(lambda: not connection.is_quiet())


@pytest.mark.parametrize(("kind", "reset"), [("unix", False), ("tcp", False), ("tcp", True)])
def test_a_value_that_is_cut_is_an_error_at_once(kind: str, reset: bool) -> None:
    """However few bytes of it have come; not after the patience."""
    with pair(kind, 20.0) as (connection, theirs):
        theirs.sendall(bytes(1000))
        if reset:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        closing = threading.Timer(0.1, theirs.close)
        closing.start()
        began = time.monotonic()
        with pytest.raises((StorageError, ConnectionError)):
            connection.read_into(memoryview(bytearray(8 << 20)))
        assert time.monotonic() - began < 10.0
        closing.join()


def test_what_nobody_asked_for_is_noticed() -> None:
    with pair() as (connection, theirs):
        assert connection.is_quiet()
        theirs.sendall(b"+OK\r\n+OK\r\n")
        assert not connection.is_quiet()
        connection.line()
        assert not connection.is_quiet()  # the rest is in the buffer
        connection.line()
        assert connection.is_quiet()


def test_tls_sends_and_receives_the_same(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", "localhost")
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_context.load_cert_chain(*pair)
    ours, theirs = socket.socketpair()
    chance = random.Random(1)
    parts = [
        chance.randbytes(chance.choice((0, 3, 90, 5000, 20_000, 3_000_000))) for _ in range(40)
    ]
    data = b"".join(parts)
    received = bytearray(len(data))

    def serve() -> None:
        with server_context.wrap_socket(theirs, server_side=True) as sock:
            read_all(sock, received)
            sock.sendall(received)

    thread = threading.Thread(target=serve)
    thread.start()
    client_context = ssl.create_default_context(cafile=str(authority.ca))
    with client_context.wrap_socket(ours, server_hostname="localhost") as sock:
        connection = Connection(sock, ADDRESS)
        connection.use(Transfer(10.0), 10.0)
        connection.send(parts)
        back = memoryview(bytearray(len(data)))
        connection.read_into(back)
    thread.join()
    assert received == data
    assert back == data


def test_silence_in_the_middle_of_a_value_counts_from_its_last_byte() -> None:
    """Though the system wakes nobody for so few bytes."""
    with pair(timeout=0.4) as (connection, theirs):
        sender = threading.Timer(0.1, theirs.sendall, [bytes(300_000)])
        sender.start()
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="no answer"):
            connection.read_into(memoryview(bytearray(4 << 20)))
        assert 0.35 < time.monotonic() - began < 0.6
        sender.join()


def test_a_silent_connection_ends_though_the_call_goes_on_elsewhere() -> None:
    transfer = Transfer(0.3)
    with pair() as (connection, _):
        connection.use(transfer, 0.3)
        stop = threading.Event()

        def elsewhere() -> None:
            while not stop.wait(0.02):
                transfer.moved(SLOWEST)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="no answer"):
            connection.line()
        assert time.monotonic() - began < 0.6
        stop.set()
        thread.join()


def test_a_pool_keeps_what_is_given_back_and_closes_it_in_the_end() -> None:
    with contextlib.ExitStack() as stack:
        made: list[Connection] = []

        def dial(address: Address, transfer: Transfer) -> Connection:
            made.append(stack.enter_context(pair())[0])
            return made[-1]

        pool = Pool(dial)
        first, second = (pool.take(ADDRESS, Transfer(1.0)) for _ in range(2))
        pool.give(second)
        assert pool.take(ADDRESS, Transfer(1.0)) is second
        pool.close()
        pool.give(second)  # closes it
        assert repr(second).startswith("<Connection here:1: closed")
        assert made == [first, second]
