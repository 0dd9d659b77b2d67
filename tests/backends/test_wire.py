"""Wire: a socket with deadlines, whatever pieces the network makes of what was sent."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_backends._options import Address
from lmcache_backends._wire import SLOWEST, Wire
from lmcache_core import StorageError
from tests.certificates import Authority

ADDRESS = Address("here", 1)
PIECE = st.binary(min_size=0, max_size=40_000)


@contextlib.contextmanager
def pair(timeout: float = 5.0) -> Iterator[tuple[Wire, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire = Wire(ours, ADDRESS)
        wire.begin(timeout)
        yield wire, theirs


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
def test_lines_and_values_come_back_however_they_are_cut(
    items: list[str | bytes], cuts: list[int]
) -> None:
    data = b"".join(i if isinstance(i, bytes) else i.encode() + b"\r\n" for i in items)
    with pair() as (wire, theirs), sending(theirs, data, cuts):
        for item in items:
            if isinstance(item, str):
                assert wire.line() == item.encode()
            else:
                target = memoryview(bytearray(len(item)))
                wire.read_into(target)
                assert target == item
        assert wire.is_quiet()


@given(st.lists(PIECE, max_size=2000))
def test_parts_are_sent_in_order(parts: list[bytes]) -> None:
    data = b"".join(parts)
    with pair() as (wire, theirs):
        got = bytearray(len(data))
        reader = threading.Thread(target=read_all, args=(theirs, got))
        reader.start()
        wire.send([memoryview(part) for part in parts])
        reader.join()
        assert got == data


def read_all(sock: socket.socket, into: bytearray) -> None:
    done = 0
    while done < len(into):
        done += sock.recv_into(memoryview(into)[done:])


def test_a_line_without_an_end_is_an_error() -> None:
    with pair() as (wire, theirs):
        theirs.sendall(b"x" * 20_000)
        with pytest.raises(StorageError, match="protocol"):
            wire.line()


def test_another_text_than_expected_is_an_error() -> None:
    with pair() as (wire, theirs):
        theirs.sendall(b"\r\nxy")
        wire.expect(b"\r\n")
        with pytest.raises(StorageError, match="protocol"):
            wire.expect(b"\r\n")


def test_the_end_of_the_connection_is_an_error() -> None:
    with pair() as (wire, theirs):
        theirs.sendall(b"half a li")
        theirs.close()
        with pytest.raises(StorageError, match="closed"):
            wire.line()
        assert not wire.is_quiet()


def test_silence_and_a_full_pipe_cost_the_patience_and_no_more() -> None:
    with pair(0.1) as (wire, _):
        for step in (wire.line, lambda: wire.read_into(memoryview(bytearray(4)))):
            wire.begin(0.1)
            began = time.monotonic()
            with pytest.raises(TimeoutError, match="no answer"):
                step()
            assert 0.09 < time.monotonic() - began < 1.0
        wire.begin(0.1)
        with pytest.raises(TimeoutError, match="no answer"):
            wire.send([bytes(64 << 20)])


def test_a_trickle_is_no_progress() -> None:
    """A byte in a while keeps no call alive; SLOWEST bytes a second do."""
    with pair() as (wire, theirs):
        stop = threading.Event()

        def trickle() -> None:
            while not stop.wait(0.01):
                theirs.send(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        wire.begin(0.2)
        with pytest.raises(TimeoutError):
            wire.read_into(memoryview(bytearray(1 << 20)))
        stop.set()
        thread.join()
    with pair() as (wire, theirs):
        portion, count = bytes(SLOWEST // 10), 8

        def steady() -> None:
            for _ in range(count):
                theirs.sendall(portion)
                time.sleep(0.05)

        thread = threading.Thread(target=steady)
        thread.start()
        wire.begin(0.2)  # less than it takes in all
        wire.read_into(memoryview(bytearray(len(portion) * count)))
        thread.join()


def test_what_nobody_asked_for_is_noticed() -> None:
    with pair() as (wire, theirs):
        assert wire.is_quiet()
        theirs.sendall(b"+OK\r\n+OK\r\n")
        assert not wire.is_quiet()
        wire.line()
        assert not wire.is_quiet()  # the rest is in the buffer
        wire.line()
        assert wire.is_quiet()


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
        wire = Wire(sock, ADDRESS)
        wire.begin(10.0)
        wire.send(parts)
        back = memoryview(bytearray(len(data)))
        wire.read_into(back)
    thread.join()
    assert received == data
    assert back == data
