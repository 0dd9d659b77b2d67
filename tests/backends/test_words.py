"""What a store says is what an operator reads: its own words, whoever listens at its port.

"No answer" is for no answer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmcache_backends.memcached import MemcachedBackend, MemcachedOptions
from lmcache_backends.redis import RedisBackend, RedisOptions
from lmcache_backends.s3 import S3Backend, S3Options
from lmcache_core.backend import Refused, StorageBackend, Transfer
from lmcache_core.errors import StorageError
from tests.certificates import Authority
from tests.system import needs_root

DENIED = b"-DENIED Redis is running in protected mode because no password is set.\r\n"
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
SLOW_DOWN = b"HTTP/1.1 503 x\r\nContent-Length: 36\r\n\r\n<Error><Code>SlowDown</Code></Error>"


def redis(port: int, scheme: str = "redis", login: str = "", path: str = "") -> StorageBackend:
    return RedisBackend(RedisOptions(url=f"{scheme}://{login}127.0.0.1:{port}{path}"))


def memcached(port: int, **more: object) -> StorageBackend:
    return MemcachedBackend(MemcachedOptions(url=f"memcached://127.0.0.1:{port}", **more))


def s3(port: int, scheme: str = "http") -> StorageBackend:
    endpoint = f"{scheme}://127.0.0.1:{port}"
    return S3Backend(S3Options(url="s3://key:secret@bucket", endpoint=endpoint, addressing="path"))


def handle(connection: socket.socket, first: bytes, answer: bytes) -> None:
    with connection, contextlib.suppress(OSError):
        connection.sendall(first)
        if first:  # and hangs up
            connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            connection.sendall(answer)


@contextlib.contextmanager
def listening(work: Callable[[socket.socket], object]) -> Iterator[int]:
    """A port on which a thread does `work` with each connection."""

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                threads.append(threading.Thread(target=work, args=(connection,)))
                threads[-1].start()

    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threads.append(threading.Thread(target=accept))
        threads[0].start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)


def said(backend: StorageBackend) -> Exception:
    """What it raises when it is asked whether its store works."""
    try:
        backend.ping(Transfer(1.0))
    except Exception as error:
        return error
    finally:
        backend.close()
    return RuntimeError("nothing")


@pytest.mark.parametrize(
    ("open_backend", "first", "answer", "kind", "words"),
    [
        (redis, DENIED, b"", Refused, "DENIED Redis is running in protected mode"),
        (redis, b"", DENIED, Refused, "DENIED Redis is running in protected mode"),
        (redis, b"-ERR max number of clients reached\r\n", b"", StorageError, "max number of clients"),
        (redis, b"", b"-LOADING Redis is loading\r\n", StorageError, "LOADING Redis is loading"),
        (redis, b"", b"-NOAUTH Authentication required.\r\n", Refused, "NOAUTH Authentication"),
        (redis, b"", BAD_REQUEST, StorageError, "what the protocol says: 'HTTP/1.1 400 Bad Request'"),
        (redis, b"", b"+" + b"x" * 99_999, StorageError, "a line without an end"),
        (redis, b"", b"$999999999\r\n", StorageError, "an answer of 999999999 bytes"),
        (memcached, b"", BAD_REQUEST, StorageError, "HTTP/1.1 400 Bad Request"),
        (memcached, b"", b"x" * 99_999, StorageError, "a line without an end"),
        (memcached, b"", b"CLIENT_ERROR unauthenticated\r\n", Refused, "CLIENT_ERROR unauthenticated"),
        (memcached, b"", b"-ERR unknown command 'stats'\r\n", StorageError, "-ERR unknown command"),
        (s3, b"", b"+OK\r\n", StorageError, "Expected HTTP/"),
        (s3, b"", SLOW_DOWN, StorageError, r"the server says SlowDown \(503\), for 1 s"),
    ],
)  # fmt: skip
def test_the_servers_words_are_told(
    open_backend: Callable[[int], StorageBackend],
    first: bytes,
    answer: bytes,
    kind: type[Exception],
    words: str,
) -> None:
    with listening(lambda connection: handle(connection, first, answer)) as port:
        with pytest.raises(kind, match=words) as told:
            raise said(open_backend(port))
        assert type(told.value) is kind or kind is StorageError
        assert "no answer" not in str(told.value)
        assert str(told.value).count(f"127.0.0.1:{port}") <= 1 or open_backend is s3


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"-ERR invalid password\r\n", Refused),
        (b"-WRONGPASS invalid username-password pair\r\n", Refused),
        (b"-ERR DB index is out of range\r\n", Refused),
        (b"-LOADING Redis is loading\r\n", StorageError),
        (b"-ERR max number of clients reached\r\n", StorageError),
    ],
)
def test_a_no_to_a_login_is_for_good_unless_it_passes(answer: bytes, kind: type[Exception]) -> None:
    with listening(lambda connection: handle(connection, b"", answer)) as port:
        for backend in (redis(port, login=":secret@"), redis(port, path="/3")):
            error = said(backend)
            assert type(error) is kind
            assert answer.decode()[1:].strip() in str(error)


def test_a_server_that_knows_no_users_has_the_password_alone() -> None:
    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while got := connection.recv(1 << 16):
                refused = b"-ERR wrong number of arguments for 'auth' command\r\n"
                connection.sendall(refused if b"someone" in got else b"+OK\r\n")
                connection.sendall(b"+PONG\r\n" * got.count(b"PING"))

    with listening(serve) as port:
        assert str(said(redis(port, login="someone:secret@"))) == "nothing"


@pytest.mark.parametrize(
    "open_backend",
    [
        lambda port: redis(port, "rediss"),
        lambda port: memcached(port, tls={}),
        lambda port: s3(port, "https"),
    ],
)
def test_a_plain_port_asked_for_tls(open_backend: Callable[[int], StorageBackend]) -> None:
    with (
        listening(lambda connection: handle(connection, b"", b"ERROR\r\n")) as port,
        pytest.raises(Refused, match="the port does not speak TLS"),
    ):
        raise said(open_backend(port))


def test_a_plain_redis_is_silent_to_tls() -> None:
    with (
        listening(lambda connection: handle(connection, b"", b"")) as port,
        pytest.raises(StorageError, match="to TLS, which a plain port takes for the begin of a"),
    ):
        raise said(redis(port, "rediss"))


@pytest.mark.parametrize("open_backend", [redis, memcached])
def test_a_port_that_speaks_tls_asked_without(
    tmp_path: Path, open_backend: Callable[[int], StorageBackend]
) -> None:
    pair = Authority(tmp_path).issue("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)

    def shake_hands(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            context.wrap_socket(connection, server_side=True).close()

    with (
        listening(shake_hands) as port,
        pytest.raises(StorageError, match="a server that speaks TLS hangs up on who does not"),
    ):
        raise said(open_backend(port))


@pytest.mark.parametrize("open_backend", [redis, memcached, s3])
def test_no_answer_is_for_no_answer(open_backend: Callable[[int], StorageBackend]) -> None:
    with (
        listening(lambda connection: handle(connection, b"", b"")) as port,
        pytest.raises(StorageError, match="no answer within"),
    ):
        raise said(open_backend(port))


@needs_root
@pytest.mark.parametrize("scheme", ["redis", "memcached"])
@pytest.mark.parametrize(
    ("owner", "mode", "warned"),
    [(12345, 0o1777, True), (12345, 0o755, False), (0, 0o1777, False)],
)
def test_a_socket_that_anybody_could_have_made_is_warned_of(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    scheme: str,
    owner: int,
    mode: int,
    warned: bool,
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        os.chown(path, owner, -1)
        tmp_path.chmod(mode)
        if scheme == "redis":
            said(RedisBackend(RedisOptions(url=f"unix://{path}")))
        else:
            said(MemcachedBackend(MemcachedOptions(url=f"memcached://{path}")))
    assert (f"{path} belongs to user 12345, in a directory" in caplog.text) == warned
