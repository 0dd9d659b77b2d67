"""redis: the conformance suite, and what servers and networks do."""

from __future__ import annotations

import functools
import logging
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import redis as stock
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

import lmcache_core
from lmcache_backends.redis.backend import PIECE, RedisBackend, RedisOptions
from lmcache_core import ChunkKey, ConfigError
from lmcache_core.backend import Refused, StorageBackend, Transfer
from lmcache_core.errors import StorageError
from lmcache_core.testing import BackendConformance, no_leaks
from tests.backends.frames import (
    LONG,
    SHORT,
    Into,
    allocate,
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
from tests.backends.redis_servers import cluster, redis_server, sentinels
from tests.backends.remote import Opener, RemoteConformance, TlsConformance
from tests.certificates import Authority
from tests.servers import Proxy, Server, eventually, free_port, running


class RawRedis:
    """A bare client."""

    def __init__(self, client: stock.Redis, prefix: str = "lmcache") -> None:
        self._client, self._prefix = client, prefix

    def read(self, key: ChunkKey) -> bytes | None:
        return self._client.get(f"{self._prefix}:{key}")

    def write(self, key: ChunkKey, value: bytes) -> None:
        self._client.set(f"{self._prefix}:{key}", value)

    def keys(self) -> set[ChunkKey]:
        names = self._client.scan_iter(f"{self._prefix}:*", 1000)
        return {ChunkKey.parse(name.decode().split(":")[1]) for name in names}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server for all tests that do it no harm."""
    port = free_port()
    with running(redis_server(tmp_path_factory.mktemp("redis"), port)):
        yield port


@pytest.fixture
def client(port: int) -> Iterator[stock.Redis]:
    with stock.Redis(port=port, protocol=2) as client:
        client.flushall()
        yield client


@pytest.fixture
def proxy(port: int, client: stock.Redis) -> Iterator[Proxy]:
    with Proxy(port) as proxy:
        yield proxy


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, Server]]:
    """A server to be killed and frozen."""
    port = free_port()
    with running(redis_server(tmp_path, port)) as server:
        yield port, server


def opener(*ports: int, **options: object) -> Callable[[], RedisBackend]:
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    options = {"url": f"redis://{hosts}", **options}
    return functools.partial(RedisBackend, RedisOptions(**options))


class TestRedis(BackendConformance):
    persistent = shared = True

    @pytest.fixture
    def raw(self, client: stock.Redis) -> RawRedis:
        return RawRedis(client)

    @pytest.fixture
    def open_backend(self, port: int, client: stock.Redis) -> Callable[[], StorageBackend]:
        return opener(port)


@pytest.fixture
def backend(port: int, client: stock.Redis) -> Iterator[RedisBackend]:
    with no_leaks():
        backend = opener(port)()
        yield backend
        backend.close()


# Round trips and copies


def test_a_lookup_of_any_number_of_chunks_is_one_round_trip(proxy: Proxy) -> None:
    backend = opener(proxy.port)()
    numbers = range(128)
    put(backend, *numbers, nbytes=100)
    before = proxy.round_trips
    assert all(here(backend, *numbers))
    assert proxy.round_trips == before + 1
    backend.delete(keys(*numbers), Transfer(LONG))
    assert proxy.round_trips == before + 2
    assert proxy.connections == 1
    backend.close()


def test_values_are_neither_copied_nor_joined(backend: RedisBackend) -> None:
    nbytes = 8 << 20
    parts = [memoryview(value(1, nbytes // 2)), memoryview(value(2, nbytes // 2))]
    target = memoryview(bytearray(nbytes))
    here(backend, 1)
    tracemalloc.start()
    backend.put([(key(1), parts)], [key(1)], Transfer(LONG))
    ((_, got),) = backend.get([key(1)], Into(LONG, lambda n: target[:n]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert got[0].obj is target.obj
    assert target == b"".join(parts)


def test_a_value_waits_in_the_server_in_pieces_only(tmp_path: Path) -> None:
    """What Redis has copied and nobody has read yet is less than two of them and a bit."""
    port = free_port()
    limit = ["--client-output-buffer-limit", "normal", str(2 * PIECE + 100_000), "0", "0"]
    with running(redis_server(tmp_path, port, *limit)):
        backend = opener(port)()
        nbytes = 6 * PIECE + 5
        put(backend, 1, 2, nbytes=nbytes)
        assert everything(backend, 1, 2, nbytes=nbytes)
        once = Retry(NoBackoff(), 0)
        with stock.Redis(port=port, retry=once) as whole, pytest.raises(stock.ConnectionError):
            whole.get(f"lmcache:{key(1)}")
        backend.close()


@pytest.mark.parametrize("nbytes", [PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_pieces_meet_where_they_should(backend: RedisBackend, nbytes: int) -> None:
    put(backend, 1, 2, 3, nbytes=nbytes)
    put(backend, 4, nbytes=10)
    assert get(backend, 4, 3, 9, 1) == {
        4: value(4, 10),
        3: value(3, nbytes),
        1: value(1, nbytes),
    }


def test_a_small_value_that_is_replaced_while_others_are_read_comes_whole(
    client: stock.Redis, backend: RedisBackend
) -> None:
    """Not cut to the length that it had: that would be damage, and be removed."""
    put(backend, *range(8), nbytes=300_000)
    arriving = backend.get(keys(*range(8)), Transfer(LONG))
    next(arriving)
    client.set(f"lmcache:{key(7)}", value(99, 310_000))
    found = {i: b"".join(parts) for i, parts in arriving}
    assert found == {i: value(i, 300_000) for i in range(1, 7)} | {7: value(99, 310_000)}


def test_a_value_that_is_no_string_any_more_takes_no_other_with_it(
    client: stock.Redis, backend: RedisBackend
) -> None:
    put(backend, *range(4), nbytes=4 * PIECE)

    def change_and_allocate(n: int) -> memoryview:
        with client.pipeline() as at_once:
            at_once.delete(f"lmcache:{key(1)}").rpush(f"lmcache:{key(1)}", "a list").execute()
        return allocate(n)

    arriving = backend.get(keys(*range(4)), Into(LONG, change_and_allocate))
    found = {i: b"".join(parts) for i, parts in arriving}
    assert found == {i: value(i, 4 * PIECE) for i in (0, 2, 3)}


@pytest.mark.parametrize("then", [None, 5, 4 * PIECE, 10 * PIECE + 1, 20 * PIECE])
def test_a_value_that_goes_while_it_is_read_is_a_miss(
    client: stock.Redis, backend: RedisBackend, then: int | None
) -> None:
    """Or another one is there meanwhile, of `then` bytes; those behind it come all the same."""
    nbytes = 10 * PIECE
    put(backend, 1, 2, nbytes=nbytes)

    def change_and_allocate(n: int) -> memoryview:
        client.delete(f"lmcache:{key(1)}")
        if then is not None:
            client.set(f"lmcache:{key(1)}", bytes(then))
        return allocate(n)

    found = {
        i: b"".join(parts) for i, parts in backend.get(keys(1, 2), Into(LONG, change_and_allocate))
    }
    assert found == {1: value(2, nbytes)}
    assert here(backend, 2) == [True]


def test_two_nodes_that_store_the_same_chunk_keep_the_first(
    port: int, client: stock.Redis, backend: RedisBackend
) -> None:
    other = opener(port)()
    put(backend, 1, 2)
    frames = [(key(n), [memoryview(b"the other's")]) for n in (2, 3)]
    assert other.put(frames, keys(2, 3), Transfer(LONG)) == 2
    assert get(other, 2, 3) == {2: value(2), 3: b"the other's"}
    other.close()


# Keys


def test_deployments_share_a_server_under_their_prefixes(port: int, client: stock.Redis) -> None:
    one, two = opener(port)(), opener(port, prefix="team-b")()
    client.set("lmcache:not-a-key", "x")
    client.set(f"lmcache:{key(9)}:more", "x")
    put(one, 1)
    put(two, 2)
    assert here(one, 1, 2) == [True, False]
    assert [stored.key for stored in scan(one)] == [key(1)]
    assert [stored.key for stored in scan(two)] == [key(2)]
    assert client.exists(f"team-b:{key(2)}")
    one.close()
    two.close()


def test_a_ttl_ends_a_chunk_and_a_use_begins_it_anew_if_asked(
    port: int, client: stock.Redis
) -> None:
    plain, refreshing = opener(port, ttl="90s")(), opener(port, ttl="90s", refresh=True)()
    put(plain, 1)
    name = f"lmcache:{key(1)}"
    assert 0 < client.pttl(name) <= 90_000
    client.pexpire(name, 1000)
    plain.touch([key(1)], Transfer(LONG))
    assert client.pttl(name) <= 1000
    refreshing.touch([key(1)], Transfer(LONG))
    assert client.pttl(name) > 80_000
    client.pexpire(name, 1)
    eventually(lambda: here(plain, 1) == [False])
    plain.close()
    refreshing.close()


def test_without_a_ttl_chunks_stay(client: stock.Redis, backend: RedisBackend) -> None:
    put(backend, 1)
    assert client.pttl(f"lmcache:{key(1)}") == -1


def test_a_key_of_another_type_is_found_out_and_can_be_removed(
    client: stock.Redis, backend: RedisBackend
) -> None:
    put(backend, 1, 3)
    client.rpush(f"lmcache:{key(2)}", "a list")
    assert get(backend, 1, 2, 3) == {1: value(1), 2: b"", 3: value(3)}
    assert {stored.key: stored.nbytes for stored in scan(backend)}[key(2)] == 0
    backend.delete([key(2)], Transfer(LONG))
    assert put(backend, 2) == 1
    assert everything(backend, 1, 2, 3)


# Servers that fail, and networks


class TestServersAndNetworks(RemoteConformance, TlsConformance):
    encrypted = "rediss"

    @pytest.fixture
    def opener(self) -> Opener:
        return opener


def test_kill_9_in_the_middle_of_a_store(server: tuple[int, Server]) -> None:
    port, process = server
    backend = opener(port)()

    def dying() -> Iterator[memoryview]:
        yield memoryview(value(1, 4 << 20))
        process.kill()
        yield memoryview(value(2, 4 << 20))

    with pytest.raises((StorageError, OSError)):
        backend.put([(key(1), Lazy(dying(), 2, 8 << 20))], [key(1)], Transfer(LONG))  # type: ignore[list-item]
    process.start()
    assert here(backend, 1) == [False]
    assert put(backend, 1) == 1
    assert everything(backend, 1)
    backend.close()


class Lazy(Sequence[memoryview]):
    """Parts made when they are asked for, so that something can happen between them."""

    def __init__(self, parts: Iterator[memoryview], count: int, nbytes: int) -> None:
        self._parts, self._count = parts, count
        self._sizes = [nbytes // count] * count
        self._sized = False

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: object) -> memoryview:
        raise NotImplementedError

    def __iter__(self) -> Iterator[memoryview]:
        if not self._sized:
            self._sized = True
            return iter([memoryview(bytes(n)) for n in self._sizes])
        return self._parts


def test_a_paused_server_costs_the_patience(client: stock.Redis, backend: RedisBackend) -> None:
    put(backend, 1)
    client.client_pause(700)
    with pytest.raises(TimeoutError):
        here(backend, 1, timeout=0.1)
    assert here(backend, 1) == [True]


def test_a_server_that_accepts_and_never_answers(server: tuple[int, Server]) -> None:
    port, process = server
    process.freeze()
    began = time.monotonic()
    backend = opener(port)()  # costs its own patience once, and is no error
    assert time.monotonic() - began < 3.0
    process.thaw()
    assert put(backend, 1) == 1
    backend.close()


def test_garbage_is_an_error_or_stays_within_its_value(proxy: Proxy) -> None:
    """A checksum finds damage within a value; no value may be taken for another's."""
    backend = opener(proxy.port)()
    put(backend, *range(6), nbytes=3000)
    chance = random.Random(2)
    for _ in range(150):
        backend._servers.distrust()
        proxy.garble_at = (chance.randrange(19_000), chance.randbytes(chance.choice((1, 2, 9))))
        got: dict[int, bytes] = {}
        try:
            for i, parts in backend.get(keys(*range(6)), Transfer(0.2)):
                got[i] = b"".join(parts)
        except (StorageError, OSError, MemoryError):
            pass
        for n, v in got.items():
            same = sum(a == b for a, b in zip(v, value(n, 3000), strict=False))
            assert same >= len(v) - 9
        proxy.heal()
        assert everything(backend, *range(6), nbytes=3000)
    backend.close()


# A server that refuses


def test_a_full_server_takes_what_fits_and_goes_on_serving(tmp_path: Path) -> None:
    port = free_port()
    limits = ["--maxmemory", "4mb", "--maxmemory-policy", "noeviction"]
    with running(redis_server(tmp_path, port, *limits)):
        backend = opener(port)()
        stored = put(backend, *range(12), nbytes=400_000)
        assert 3 < stored < 12
        assert everything(backend, *range(stored), nbytes=400_000)
        assert put(backend, 20, nbytes=400_000) == 0
        backend.delete(keys(*range(stored + 2)), Transfer(LONG))
        assert put(backend, 20, nbytes=400_000) == 1
        backend.close()


def test_a_server_that_evicts_makes_room_by_itself(tmp_path: Path) -> None:
    port = free_port()
    limits = ["--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru"]
    with running(redis_server(tmp_path, port, *limits)):
        backend = opener(port)()
        for n in range(40):
            assert put(backend, n, nbytes=200_000) == 1
        assert 0 < sum(here(backend, *range(40))) < 20
        assert everything(backend, 39, nbytes=200_000)
        backend.close()


def test_a_value_larger_than_redis_takes_is_refused(
    backend: RedisBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_backends.redis.backend.LARGEST", 10_000)
    frames = [(key(n), [memoryview(value(n, n * 4000))]) for n in (1, 2, 3, 1)]
    assert backend.put(frames, keys(1, 2, 3), Transfer(LONG)) == 2
    assert here(backend, 1, 2, 3) == [True, True, False]


def test_a_replica_serves_loads_and_refuses_stores(tmp_path: Path) -> None:
    master, replica = free_port(), free_port()
    with (
        running(redis_server(tmp_path, master)),
        running(redis_server(tmp_path, replica, "--replicaof", "127.0.0.1", str(master))),
    ):
        writing, reading = opener(master)(), opener(replica)()
        put(writing, 1)
        eventually(lambda: here(reading, 1) == [True])
        with pytest.raises(StorageError, match="READONLY"):
            put(reading, 2)
        assert everything(reading, 1)
        writing.close()
        reading.close()


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[int]:
    """A server with a password, and a user who may do just what we need."""
    port = free_port()
    rights = "+ping +exists +get +getrange +set +unlink +touch +pexpire +scan +strlen"
    user = ["--user", "kv", "on", ">kv-pass-word", "~lmcache:*", *rights.split()]
    guard = ["--requirepass", "pass-word", *user]
    with running(redis_server(tmp_path, port, *guard, ready=b"-NOAUTH")):
        yield port


@pytest.mark.parametrize("login", [":pass-word", "default:pass-word", "kv:kv-pass-word"])
def test_logins_of_the_url(guarded: int, login: str) -> None:
    backend = opener(url=f"redis://{login}@127.0.0.1:{guarded}")()
    assert put(backend, 1) == 1
    assert everything(backend, 1)
    assert [stored.key for stored in scan(backend)] == [key(1)]
    backend.touch([key(1)], Transfer(LONG))
    backend.delete([key(1)], Transfer(LONG))
    backend.close()


def test_a_password_of_the_environment(guarded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_PASS", "kv-pass-word")
    backend = opener(url=f"redis://kv@127.0.0.1:{guarded}", password_env="KV_PASS")()
    assert put(backend, 1) == 1
    backend.close()
    with pytest.raises(ConfigError, match="NO_SUCH is not set"):
        opener(guarded, password_env="NO_SUCH")()


@pytest.mark.parametrize("login", ["", ":wr0ng-one@", "kv:wr0ng-one@", "nobody:wr0ng-one@"])
def test_a_wrong_login_is_a_config_error_without_the_secret(guarded: int, login: str) -> None:
    with no_leaks(), pytest.raises(Refused, match=f"127.0.0.1:{guarded}: ") as error:
        greet(opener(url=f"redis://{login}127.0.0.1:{guarded}"))
    assert "wr0ng" not in str(error.value)


def test_a_missing_right_is_a_config_error(tmp_path: Path) -> None:
    port = free_port()
    user = ["--user", "kv", "on", ">x", "~lmcache:*", "+get"]
    with running(redis_server(tmp_path, port, *user)), pytest.raises(Refused, match="ping"):
        greet(opener(url=f"redis://kv:x@127.0.0.1:{port}"))


def test_no_secret_shows_when_a_password_is_changed_under_us(
    guarded: int, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"redis://:pass-word@127.0.0.1:{guarded}"
    config = {"backend": "redis", "url": url, "deadline": "5s"}
    with caplog.at_level(logging.DEBUG), lmcache_core.open({"tiers": [config]}) as cache:
        with stock.Redis(port=guarded, password="pass-word", protocol=2) as admin:
            admin.config_set("requirepass", "an0ther-one")
            admin.client_kill_filter(_type="normal", skipme=True)
        assert cache.lookup(keys(1, 2)).chunks == 0
    assert "invalid username-password" in caplog.text
    assert "pass-word" not in caplog.text
    options = RedisOptions(url=url)
    assert "pass-word" not in repr(options) + str(options) + options.identity()


# TLS and unix sockets


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[int, Authority]]:
    """A server that wants a client's certificate, on a port that speaks TLS only."""
    port = free_port()
    authority = Authority(tmp_path)
    pair = authority.issue("localhost")
    files = ["--tls-cert-file", str(pair.cert), "--tls-key-file", str(pair.key)]
    files += ["--tls-ca-cert-file", str(authority.ca), "--tls-port", str(port), "--port", "0"]
    server = redis_server(tmp_path, port, *files)
    server._ready = (tmp_path / f"redis-{port}.log").read_text
    with running(server):
        eventually(lambda: "Ready to accept" in server._ready())
        yield port, authority


@pytest.mark.parametrize("stranger", [True, False])
def test_a_client_that_the_server_does_not_trust(
    tls: tuple[int, Authority], tmp_path: Path, stranger: bool
) -> None:
    """The server may hang up before it says why; then it is no config error, but a failure."""
    port, authority = tls
    mine = Authority(tmp_path, "stranger").issue("client")
    files = {"cert": mine.cert, "key": mine.key} if stranger else {}
    with pytest.raises((StorageError, OSError)):
        greet(opener(url=f"rediss://localhost:{port}", tls={"ca": authority.ca, **files}))


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with running(redis_server(tmp_path, free_port(), "--unixsocket", str(path))):
        backend = opener(url=f"unix://{path}?db=3")()
        assert put(backend, 1) == 1
        assert everything(backend, 1)
        other = opener(url=f"unix://{path}")()
        assert here(other, 1) == [False]
        backend.close()
        other.close()


# Sentinel


def test_a_failover_is_followed(tmp_path: Path) -> None:
    with sentinels(tmp_path, 3) as (ports, master, _):
        dead = free_port()
        backend = opener(dead, *ports, sentinel="kv")()
        assert put(backend, 1, 2) == 2
        with stock.Redis(port=ports[0], protocol=2) as client:
            replica = client.sentinel_slaves("kv")[0]["port"]
            with stock.Redis(port=replica, protocol=2) as copy:
                eventually(lambda: copy.dbsize() == 2)
            master.kill()
            eventually(lambda: client.sentinel_get_master_addr_by_name("kv")[1] == replica)
        eventually(lambda: works(backend))  # all that a bypassed tier does
        assert everything(backend, 1, 2)
        eventually(lambda: put(backend, 3, timeout=SHORT) == 1)
        master.start()
        assert everything(backend, 1, 2, 3)
        backend.close()


def test_a_service_that_the_sentinels_do_not_know(tmp_path: Path) -> None:
    with (
        sentinels(tmp_path, 1) as (ports, _, _),
        pytest.raises(Refused, match="knows no service 'other'"),
    ):
        greet(opener(*ports, sentinel="other"))


def test_a_sentinel_that_hangs_does_not_hide_the_others(tmp_path: Path, port: int) -> None:
    with sentinels(tmp_path, 1) as (ports, _, _), Proxy(ports[0]) as hung:
        hung.stall_after = 0
        backend = opener(hung.port, *ports, sentinel="kv")()
        assert put(backend, 1, timeout=1.0) == 1
        backend.close()


# Cluster


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """Ports of a cluster for all tests that do it no harm."""
    with cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield [port for port, _ in nodes]


@pytest.fixture
def cluster_client(nodes: list[int]) -> Iterator[stock.RedisCluster]:
    client = stock.RedisCluster(host="127.0.0.1", port=nodes[0], protocol=2)
    client.flushall(target_nodes=stock.RedisCluster.PRIMARIES)
    yield client
    client.close()


class TestCluster(BackendConformance):
    persistent = shared = True

    @pytest.fixture
    def raw(self, cluster_client: stock.RedisCluster) -> RawRedis:
        return RawRedis(cluster_client)

    @pytest.fixture
    def open_backend(
        self, nodes: list[int], cluster_client: stock.RedisCluster
    ) -> Callable[[], StorageBackend]:
        return opener(nodes[0], cluster=True)


def test_a_batch_is_spread_over_the_nodes(
    nodes: list[int], cluster_client: stock.RedisCluster
) -> None:
    backend = opener(free_port(), nodes[1], cluster=True)()
    put(backend, *range(60))
    for port in nodes:
        with stock.Redis(port=port, protocol=2) as client:
            assert 10 <= client.dbsize() <= 30
    assert everything(backend, *range(60))
    backend.close()


def test_a_caller_may_take_longer_than_the_patience_between_pieces(
    nodes: list[int], cluster_client: stock.RedisCluster
) -> None:
    """With several nodes a value is in its middle while another one is handed over."""
    backend = opener(nodes[0], cluster=True)()
    nbytes = 2 * PIECE + 1
    put(backend, *range(6), nbytes=nbytes)
    found = {}
    transfer = Transfer(SHORT)
    for i, parts in backend.get(keys(*range(6)), transfer):
        transfer.pause()
        found[i] = b"".join(parts)
        time.sleep(2 * SHORT)
        transfer.wait()
    assert found == {i: value(i, nbytes) for i in range(6)}
    backend.close()


def slot_of(number: int) -> int:
    return key_slot(f"lmcache:{key(number)}".encode())


def test_a_slot_that_moves_is_followed(
    nodes: list[int], cluster_client: stock.RedisCluster
) -> None:
    """ASK while its keys move one by one, MOVED afterwards, and then no detour any more."""
    backend = opener(*nodes, cluster=True)()
    put(backend, 1, 2, 3)
    slot = slot_of(1)
    clients = {port: stock.Redis(port=port, protocol=2) for port in nodes}
    home = backend._servers._table[slot].port
    target = next(port for port in nodes if port != home)
    names = {port: clients[port].cluster("myid").decode() for port in nodes}
    clients[target].cluster("setslot", slot, "importing", names[home])
    clients[home].cluster("setslot", slot, "migrating", names[target])
    assert everything(backend, 1, 2, 3)  # still at home
    clients[home].execute_command("MIGRATE", "127.0.0.1", target, f"lmcache:{key(1)}", 0, 5000)
    assert everything(backend, 1, 2, 3)  # by ASK
    assert here(backend, 1, 2, 3) == [True] * 3
    assert backend._servers._table[slot].port == home
    for port in (target, home, *nodes):
        clients[port].cluster("setslot", slot, "node", names[target])
    assert everything(backend, 1, 2, 3)  # by MOVED
    assert backend._servers._table[slot].port == target
    asked = clients[home].info("stats")["total_commands_processed"]
    backend.delete([key(1)], Transfer(LONG))
    assert put(backend, 1) == 1
    assert clients[home].info("stats")["total_commands_processed"] == asked + 1  # INFO itself
    for client in clients.values():
        client.close()
    backend.close()


def test_a_node_that_dies_and_comes_back(tmp_path: Path) -> None:
    with cluster(tmp_path, "--cluster-require-full-coverage", "no") as nodes:
        backend = opener(*(port for port, _ in nodes), cluster=True)()
        put(backend, *range(30))
        _, process = nodes[0]
        process.kill()
        with pytest.raises((StorageError, OSError)):
            here(backend, *range(30), timeout=SHORT)
        with pytest.raises((StorageError, OSError)):
            backend.ping(Transfer(SHORT))
        process.start()
        eventually(lambda: any(here(backend, *range(30), timeout=SHORT)))
        eventually(lambda: put(backend, *range(30), timeout=SHORT) == 30)
        assert everything(backend, *range(30))
        backend.close()


def test_a_cluster_that_is_taken_for_a_server_says_what_to_do(nodes: list[int]) -> None:
    backend = opener(nodes[0])()
    with pytest.raises(StorageError, match="cluster: true"):
        here(backend, *range(10))
    backend.close()


# Options


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("http://host", {}),
        ("redis://", {}),
        ("redis://host:port", {}),
        ("redis://host/zero", {}),
        ("redis://host?db=1&timeout=3", {}),
        ("redis://host:70000", {}),
        ("redis://:s3cret@a..host", {}),
        ("redis://s3cret@one,two", {}),
        ("redis://:s3cret@host/1", {"cluster": True}),
        ("redis://:s3/cret@host", {}),
        ("redis://:s3cret@host", {"cluster": True, "sentinel": "kv"}),
        ("redis://:s3cret@host", {"refresh": True}),
        ("redis://:s3cret@host", {"tls": {"check_hostname": False}}),
        ("redis://:s3cret@host", {"prefix": "{tag}"}),
        ("redis://:s3cret@host", {"ttl": 0}),
        ("redis://:s3cret@host", {"tls": {"ca": "/no/such/file"}}),
    ],
)
def test_options_that_cannot_be_are_errors_without_secrets(url: str, options: dict) -> None:
    with pytest.raises(ConfigError) as error:
        lmcache_core.open({"tiers": [{"backend": "redis", "url": url, **options}]})
    assert "tiers[0]" in str(error.value)
    assert "s3cret" not in str(error.value)
    assert "s3/cret" not in str(error.value)


def test_one_store_named_twice_is_an_error(port: int) -> None:
    tier = {"backend": "redis", "url": f"redis://127.0.0.1:{port}"}
    with pytest.raises(ConfigError, match="the same store"):
        lmcache_core.open({"tiers": [tier, {**tier, "ttl": 5}]})
    with lmcache_core.open({"tiers": [tier, {**tier, "prefix": "other"}]}):
        pass
