"""memcached: the conformance suite, and what servers and networks do."""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pymemcache.client.base import Client

import lmcache_core
from lmcache_backends.memcached.backend import MemcachedBackend, MemcachedOptions
from lmcache_core import ChunkKey, ConfigError
from lmcache_core.backend import Refused, StorageBackend, Transfer
from lmcache_core.errors import StorageError
from lmcache_core.testing import BackendConformance, no_leaks
from tests.backends.frames import (
    LONG,
    SHORT,
    everything,
    get,
    greet,
    here,
    key,
    keys,
    put,
    scan,
    value,
    works,
)
from tests.backends.remote import Opener, RemoteConformance, TlsConformance
from tests.certificates import Authority
from tests.servers import Proxy, Server, answers, eventually, free_port, program, running
from tests.threads import no_more_threads

MIB = 1 << 20


def memcached_server(port: int, *options: str, ready: bytes = b"MN\r\n") -> Server:
    command = [program("memcached"), "-p", str(port), "-l", "127.0.0.1", "-u", "root", *options]
    return Server(command, answers(port, b"mn\r\n", ready))


class RawMemcached:
    """Bare clients, which read what the module documents."""

    def __init__(self, port: int, prefix: str = "lmcache") -> None:
        self._port, self._prefix = port, prefix

    def get(self, name: str) -> bytes | None:
        with contextlib.closing(Client(("127.0.0.1", self._port))) as client:
            return client.get(name)

    def set(self, name: str, value: bytes | str, flags: int = 0) -> None:
        with contextlib.closing(Client(("127.0.0.1", self._port))) as client:
            client.set(name, value, flags=flags, noreply=False)

    def touch(self, name: str, seconds: int) -> None:
        with contextlib.closing(Client(("127.0.0.1", self._port))) as client:
            client.touch(name, seconds, noreply=False)

    def remove(self, name: str) -> None:
        with contextlib.closing(Client(("127.0.0.1", self._port))) as client:
            client.delete(name, noreply=False)

    def ask(self, command: str, end: bytes = b"\r\n") -> bytes:
        with socket.create_connection(("127.0.0.1", self._port)) as sock:
            sock.sendall(f"{command}\r\n".encode())
            text = b""
            while not text.endswith(end):
                text += sock.recv(1 << 16)
        return text

    def read(self, key: ChunkKey) -> bytes | None:
        name = f"{self._prefix}:{key}"
        value = self.get(name)
        if b" f1" not in self.ask(f"mg {name} f"):
            return value
        version, pieces, _ = value.decode().split()
        parts = [self.get(f"{name}:{version}:{n}") for n in range(int(pieces))]
        return None if None in parts else b"".join(parts)

    def write(self, key: ChunkKey, value: bytes) -> None:
        self.set(f"{self._prefix}:{key}", value)

    def names(self) -> list[str]:
        text = self.ask("lru_crawler metadump hash", b"END\r\n")
        names = re.findall(rb"key=(\S+)", text)
        return sorted(name.decode().replace("%3A", ":") for name in names)

    def keys(self) -> set[ChunkKey]:
        names = [name.split(":") for name in self.names() if name.startswith(self._prefix)]
        return {ChunkKey.parse(words[1]) for words in names if len(words) == 2}

    def left(self, name: str) -> int:
        """Seconds until an item ends; -1 for never."""
        return int(self.ask(f"mg {name} t").split()[1][1:])


@pytest.fixture(scope="module", params=["1m", "64m"])
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """A server for all tests that do it no harm, with small items and with large ones."""
    port = free_port()
    with running(memcached_server(port, "-I", request.param, "-m", "1500")):
        yield port


@pytest.fixture
def raw(port: int) -> RawMemcached:
    raw = RawMemcached(port)
    raw.ask("flush_all")
    return raw


@pytest.fixture
def backend(port: int, raw: RawMemcached) -> Iterator[MemcachedBackend]:
    with no_leaks():
        backend = opener(port)()
        yield backend
        backend.close()


@pytest.fixture
def proxy(port: int, raw: RawMemcached) -> Iterator[Proxy]:
    with Proxy(port) as proxy:
        yield proxy


@pytest.fixture
def server() -> Iterator[tuple[int, Server]]:
    """A server to be killed and frozen."""
    port = free_port()
    with running(memcached_server(port, "-m", "500")) as server:
        yield port, server


def opener(*ports: int, **options: object) -> Callable[[], MemcachedBackend]:
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    options = {"url": f"memcached://{hosts}", **options}
    return functools.partial(MemcachedBackend, MemcachedOptions(**options))


class TestMemcached(BackendConformance):
    persistent = shared = True

    @pytest.fixture
    def raw(self, raw: RawMemcached) -> RawMemcached:
        return raw

    @pytest.fixture
    def open_backend(self, port: int, raw: RawMemcached) -> Callable[[], StorageBackend]:
        return opener(port)


# Round trips and pieces


def test_a_lookup_is_one_round_trip_that_brings_no_values(proxy: Proxy) -> None:
    backend = opener(proxy.port)()
    numbers = range(128)
    put(backend, *numbers, nbytes=20_000)
    trips, received = proxy.round_trips, proxy.answered
    assert all(here(backend, *numbers))
    assert proxy.round_trips == trips + 1
    assert proxy.answered - received < 128 * 10
    backend.close()


@pytest.fixture
def small_items() -> Iterator[tuple[MemcachedBackend, RawMemcached]]:
    """A backend on a server whose items have at most 1 MiB."""
    port = free_port()
    with running(memcached_server(port, "-I", "1m", "-m", "500")):
        backend, raw = opener(port)(), RawMemcached(port)
        yield backend, raw
        backend.close()


def test_a_frame_larger_than_an_item_lies_in_pieces(
    small_items: tuple[MemcachedBackend, RawMemcached],
) -> None:
    backend, raw = small_items
    assert put(backend, 1, nbytes=5 * MIB) == 1
    assert len(raw.names()) == 1 + 6
    assert raw.read(key(1)) == value(1, 5 * MIB)
    assert everything(backend, 1, nbytes=5 * MIB)
    assert [stored.nbytes for stored in scan(backend)] == [5 * MIB]
    put(backend, 1, nbytes=5 * MIB)
    assert len(raw.names()) == 1 + 6
    backend.delete([key(1)], Transfer(LONG))
    assert len(raw.names()) == 0


@pytest.mark.parametrize("near", [-2000, -600, -513, -512, -511, -100, -1, 0, 1])
def test_sizes_near_the_largest_item(
    small_items: tuple[MemcachedBackend, RawMemcached], near: int
) -> None:
    backend, _ = small_items
    assert put(backend, 1, 2, nbytes=MIB + near) == 2
    assert everything(backend, 1, 2, nbytes=MIB + near)


HEADS = {
    "another version's": b"0" * 16 + b" 4 3145728",
    "no head": b"what is this",
    "no head, and long": b"x" * 200,
    "a value in its place": bytes(MIB - 1000),
    "more pieces than bytes": b"0123456789abcdef 999999 99",
    "more pieces than there can be": b"0123456789abcdef 999999 999999",
    "more bytes than any frame has": b"0123456789abcdef 999999 999999999999",
}
PIECES = {"shorter": b"short", "longer": bytes(MIB - 600)}


@pytest.mark.parametrize("harm", ["gone", "last gone", *HEADS, *PIECES])
def test_pieces_that_do_not_belong_together_are_no_chunk(
    small_items: tuple[MemcachedBackend, RawMemcached], harm: str
) -> None:
    """It is left out, and gone, so that it can be stored anew; its neighbours are served."""
    backend, raw = small_items
    put(backend, 1, 2, 3, nbytes=3 * MIB)
    head, *pieces = [name for name in raw.names() if str(key(2)) in name]
    assert len(pieces) == 4
    if harm in HEADS:
        raw.set(head, HEADS[harm], flags=1)
    elif harm in PIECES:
        raw.set(pieces[1], PIECES[harm])
    else:
        raw.remove(pieces[-1 if harm == "last gone" else 1])
    began = time.monotonic()
    got = backend.get(keys(1, 2, 3), Transfer(LONG, limit=64 * MIB))
    found = {i: b"".join(parts) for i, parts in got}
    assert found == {0: value(1, 3 * MIB), 2: value(3, 3 * MIB)}
    assert time.monotonic() - began < LONG / 2  # nobody asks for a million pieces
    assert here(backend, 1, 2, 3) == [True, False, True]
    assert put(backend, 2, nbytes=3 * MIB) == 1
    assert everything(backend, 1, 2, 3, nbytes=3 * MIB)


def test_pieces_that_displace_each_other_are_not_announced() -> None:
    """Where small items have filled a server, few large ones have room at a time."""
    port = free_port()
    with running(memcached_server(port, "-m", "64")):
        backend, raw = opener(port)(), RawMemcached(port)
        for first in range(0, 320, 8):
            put(backend, *range(first, first + 8), nbytes=MIB // 4)
        large = range(1000, 1008)
        stored = put(backend, *large, nbytes=2 * MIB)
        assert stored < 8
        assert here(backend, *large) == [n < stored for n in range(8)]
        assert everything(backend, *large[:stored], nbytes=2 * MIB)
        left = [name for name in raw.names() if any(str(key(n)) in name for n in large[stored:])]
        assert left == []  # nor do they take room from others
        backend.close()


def test_two_nodes_that_store_the_same_chunk_keep_the_first(
    small_items: tuple[MemcachedBackend, RawMemcached],
) -> None:
    backend, raw = small_items
    put(backend, 1, nbytes=3 * MIB)
    assert len(raw.names()) == 1 + 4
    other = MemcachedBackend(MemcachedOptions(url=f"memcached://127.0.0.1:{raw._port}"))
    other.contains = lambda keys, timeout: [False] * len(keys)  # it asked just before
    frames = [(key(1), [memoryview(bytes(3 * MIB))]), (key(2), [memoryview(b"x")])]
    assert other.put(frames, keys(1, 2), Transfer(LONG)) == 2
    assert everything(backend, 1, nbytes=3 * MIB)
    assert len(raw.names()) == 1 + 4 + 1
    other.close()


# Keys


def test_deployments_share_a_server_under_their_prefixes(port: int, raw: RawMemcached) -> None:
    one, two = opener(port)(), opener(port, prefix="team-b")()
    raw.set("lmcache:not-a-key", "x")
    put(one, 1)
    put(two, 2)
    assert here(one, 1, 2) == [True, False]
    assert [stored.key for stored in scan(one)] == [key(1)]
    assert [stored.key for stored in scan(two)] == [key(2)]
    one.close()
    two.close()


def test_a_scan_misses_nothing_that_others_use(port: int) -> None:
    """memcached moves items from list to list as they are used; the walk goes another way."""
    backend, other = opener(port)(), opener(port)()
    numbers = range(2000)
    put(backend, *numbers, nbytes=300)
    done = threading.Event()

    def use() -> None:
        while not done.is_set():
            for first in range(0, len(numbers), 50):
                get(other, *numbers[first : first + 50])
                put(other, *numbers[first : first + 50], nbytes=300)

    thread = threading.Thread(target=use)
    thread.start()
    try:
        for _ in range(20):
            assert {stored.key for stored in scan(backend)} >= set(keys(*numbers))
    finally:
        done.set()
        thread.join()
        backend.delete(keys(*numbers), Transfer(LONG))
    backend.close()
    other.close()


@pytest.mark.parametrize("nbytes", [100, 3 * MIB])
def test_a_ttl_ends_a_chunk_and_a_use_begins_it_anew_if_asked(
    small_items: tuple[MemcachedBackend, RawMemcached], nbytes: int
) -> None:
    _, raw = small_items
    plain, refreshing = opener(raw._port, ttl="90s")(), opener(raw._port, ttl=90, refresh=True)()
    put(plain, 1, nbytes=nbytes)
    assert len(raw.names()) == (1 if nbytes < MIB else 1 + 4)
    for name in raw.names():
        assert 80 <= raw.left(name) <= 90
        raw.touch(name, 20)
    plain.touch([key(1)], Transfer(LONG))
    assert all(raw.left(name) <= 20 for name in raw.names())
    refreshing.touch([key(1)], Transfer(LONG))
    assert all(raw.left(name) > 80 for name in raw.names())
    long = opener(raw._port, ttl=40 * 24 * 3600)()
    put(long, 2, nbytes=nbytes)
    days = {raw.left(name) // 86400 for name in raw.names() if str(key(2)) in name}
    assert days <= {39, 40}
    short = opener(raw._port, ttl="200ms")()
    put(short, 3, nbytes=nbytes)
    eventually(lambda: here(short, 3) == [False])
    for backend in (plain, refreshing, long, short):
        backend.close()


# Several servers


@pytest.fixture
def three() -> Iterator[list[tuple[int, Server]]]:
    ports = [free_port() for _ in range(3)]
    servers = [memcached_server(port) for port in ports]
    with running(servers[0]), running(servers[1]), running(servers[2]):
        yield list(zip(ports, servers, strict=True))


def test_a_batch_is_spread_over_servers_and_any_order_of_them_is_the_same(
    three: list[tuple[int, Server]],
) -> None:
    ports = [port for port, _ in three]
    backend, other = opener(*ports)(), opener(*reversed(ports))()
    put(backend, *range(900))
    for port in ports:  # 300, with a standard deviation of 14
        assert 200 <= len(RawMemcached(port).keys()) <= 400
    assert everything(other, *range(900))
    assert len(scan(other)) == 900
    backend.close()
    other.close()


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_a_server_that_is_lost_loses_its_share_and_comes_back(
    three: list[tuple[int, Server]], fault: str
) -> None:
    backend = opener(*(port for port, _ in three))()
    put(backend, *range(60))
    port, server = three[0]
    places = backend._servers.of(keys(*range(60)))
    lost = {stored for stored, place in enumerate(places) if place.port == port}
    assert 0 < len(lost) < 60
    getattr(server, fault)()
    began = time.monotonic()
    found = here(backend, *range(60), timeout=SHORT)
    assert [n for n in range(60) if not found[n]] == sorted(lost)
    assert time.monotonic() - began < SHORT + 0.5
    began = time.monotonic()
    for _ in range(20):  # its keys are the others' now, and nobody waits for it
        assert put(backend, *range(60), timeout=SHORT) == 60
        assert everything(backend, *range(60))
    assert time.monotonic() - began < 20 * SHORT + 5.0
    server.kill()
    server.start()
    eventually(
        lambda: put(backend, *range(60)) == 60 and backend._servers.in_use() == backend._servers.all
    )
    assert put(backend, *range(60)) == 60
    assert everything(backend, *range(60))
    eventually(lambda: len(RawMemcached(port).keys()) == len(lost))
    backend.close()


def test_a_server_that_nobody_can_probe_is_not_left_out(
    three: list[tuple[int, Server]],
) -> None:
    backend = opener(*(port for port, _ in three))()
    put(backend, *range(60))
    _, server = three[0]
    server.kill()
    with no_more_threads():
        assert not all(here(backend, *range(60), timeout=SHORT))
    assert backend._servers.in_use() == backend._servers.all
    server.start()
    eventually(lambda: put(backend, *range(60)) == 60)
    backend.close()


def test_all_servers_lost_is_a_failure(three: list[tuple[int, Server]]) -> None:
    backend = opener(*(port for port, _ in three))()
    for _, server in three:
        server.kill()
    for _ in range(3):
        with pytest.raises((StorageError, OSError)):
            here(backend, *range(60), timeout=SHORT)
        assert not works(backend)
    for _, server in three:
        server.start()
    eventually(lambda: works(backend))
    assert put(backend, *range(60)) == 60
    backend.close()


# Servers that fail, and networks


class TestServersAndNetworks(RemoteConformance, TlsConformance):
    encrypted = "memcached"

    @pytest.fixture
    def opener(self) -> Opener:
        return opener


# A server that refuses


@pytest.mark.parametrize("nbytes", [400_000, 3 * MIB])
def test_a_full_server_takes_what_fits_and_goes_on_serving(nbytes: int) -> None:
    port = free_port()
    with running(memcached_server(port, "-M", "-m", "40")):
        backend = opener(port)()
        count = 60 * MIB // nbytes
        stored = put(backend, *range(count), nbytes=nbytes)
        assert 0 < stored < count
        assert everything(backend, *range(stored), nbytes=nbytes)
        backend.close()


@pytest.mark.parametrize("nbytes", [200_000, 3 * MIB])
def test_a_server_that_evicts_makes_room_by_itself(nbytes: int) -> None:
    port = free_port()
    with running(memcached_server(port, "-m", "64")):
        backend = opener(port)()
        count = 160 * MIB // nbytes
        for n in range(count):
            assert put(backend, n, nbytes=nbytes) == 1
        got = get(backend, *range(count))
        assert 0 < len(got) < count
        assert all(v == value(n, nbytes) for n, v in got.items())
        backend.close()


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[int]:
    """A server with a password."""
    port = free_port()
    users = tmp_path / "users"
    users.write_text("kv:pass-word\n")
    with running(memcached_server(port, "-Y", str(users), ready=b"CLIENT_ERROR")):
        yield port


def test_logins(guarded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_PASS", "pass-word")
    for url, more in (
        (f"memcached://kv:pass-word@127.0.0.1:{guarded}", {}),
        (f"memcached://kv@127.0.0.1:{guarded}", {"password_env": "KV_PASS"}),
    ):
        backend = opener(url=url, **more)()
        assert put(backend, 1) == 1
        assert everything(backend, 1)
        backend.close()
        options = MemcachedOptions(url=url, **more)
        assert "pass-word" not in repr(options) + options.identity()


@pytest.mark.parametrize("login", ["", "kv:wr0ng-one@", "nobody:wr0ng-one@"])
def test_a_wrong_login_is_a_config_error_without_the_secret(guarded: int, login: str) -> None:
    with no_leaks(), pytest.raises(Refused, match=r"127.0.0.1:\d+: .*authent") as error:
        greet(opener(url=f"memcached://{login}127.0.0.1:{guarded}"))
    assert "wr0ng" not in str(error.value)


# TLS and unix sockets


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[int, Authority]]:
    """A server that wants a client's certificate."""
    port = free_port()
    authority = Authority(tmp_path)
    pair = authority.issue("localhost")
    files = f"ssl_chain_cert={pair.cert},ssl_key={pair.key},ssl_ca_cert={authority.ca}"
    server = memcached_server(port, "-m", "200", "-Z", "-o", f"{files},ssl_verify_mode=2")
    server._ready = lambda: socket.create_connection(("127.0.0.1", port), 1.0).close()
    with running(server):
        yield port, authority


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "memcached.sock"
    command = [program("memcached"), "-s", str(path), "-u", "root"]
    with running(Server(command, path.stat)):
        backend = opener(url=f"memcached://{path}")()
        assert put(backend, 1, nbytes=3 * MIB) == 1
        assert everything(backend, 1, nbytes=3 * MIB)
        backend.close()


# Options


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis://host", {}),
        ("memcached://", {}),
        ("memcached://host:port", {}),
        ("memcached://u:s3cret@host,a..host", {}),
        ("memcached://host/path", {}),
        ("memcached://host?x=1", {}),
        ("memcached://u:s3cret@host", {"refresh": True}),
        ("memcached://u:s3cret@host", {"prefix": "two words"}),
        ("memcached://u:s3/cret@host", {}),
        ("memcached://u:s3cret@host", {"tls": {"ca": "/no/such/file"}}),
        ("memcached://u:s3cret@host", {"password_env": "NO_SUCH"}),
    ],
)
def test_options_that_cannot_be_are_errors_without_secrets(url: str, options: dict) -> None:
    with pytest.raises(ConfigError) as error:
        lmcache_core.open({"tiers": [{"backend": "memcached", "url": url, **options}]})
    assert "tiers[0]" in str(error.value)
    assert "s3cret" not in str(error.value)
    assert "s3/cret" not in str(error.value)
