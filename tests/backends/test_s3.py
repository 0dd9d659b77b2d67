"""s3: the conformance suite on a real server, and what only S3 can suffer."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

import lmcache_core
from lmcache_backends.s3 import backend as s3
from lmcache_backends.s3.backend import S3Backend, S3Options
from lmcache_core import ChunkKey, ConfigError, KVLayout, LayerGroup, Tensors, unverified
from lmcache_core.backend import Refused, Transfer
from lmcache_core.config.loading import load as load_config
from lmcache_core.errors import StorageError
from lmcache_core.testing import BackendConformance, no_leaks
from tests.backends.frames import (
    LONG,
    NBYTES,
    Into,
    allocate,
    get,
    greet,
    here,
    key,
    keys,
    put,
    scan,
    value,
)
from tests.backends.remote import Opener, RemoteConformance
from tests.certificates import Authority, Pair
from tests.s3_server import (
    BUCKET,
    KEY_ID,
    PUBLIC,
    SECRET,
    STRANGER_ID,
    STRANGER_SECRET,
    Answer,
    Front,
    S3Server,
    client,
    s3_server,
)
from tests.servers import PATIENCE, Proxy, eventually, free_port

pytestmark = pytest.mark.xdist_group("s3")  # one worker, so one server
LOGIN = f"{KEY_ID}:{SECRET.replace('/', '%2F')}@"


class RawObjects:
    """The bucket, by the layout that the module documents."""

    def __init__(self, endpoint: str, prefix: str) -> None:
        self.endpoint, self.prefix = endpoint, prefix

    def name(self, key: ChunkKey) -> str:
        return f"{self.prefix}/{str(key)[-3:]}/{key}"

    def read(self, key: ChunkKey) -> bytes | None:
        with client(self.endpoint) as s3:
            try:
                return s3.get_object(Bucket=BUCKET, Key=self.name(key))["Body"].read()
            except s3.exceptions.NoSuchKey:
                return None

    def write(self, key: ChunkKey, value: bytes) -> None:
        with client(self.endpoint) as s3:
            s3.put_object(Bucket=BUCKET, Key=self.name(key), Body=value)

    def keys(self) -> set[ChunkKey]:
        with client(self.endpoint) as s3:
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=self.prefix)
            names = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {ChunkKey.parse(name.rpartition("/")[2]) for name in names}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def prefix() -> str:
    return f"test/{uuid.uuid4().hex}"


def options(
    endpoint: str | int, prefix: str, bucket: str = BUCKET, login: str = LOGIN, **more: object
) -> S3Options:
    """`endpoint`: an address, or a port of this host."""
    if isinstance(endpoint, int):
        endpoint = f"http://127.0.0.1:{endpoint}"
    return S3Options(url=f"s3://{login}{bucket}/{prefix}", endpoint=endpoint, **more)


@pytest.fixture
def opened() -> Iterator[Callable[..., S3Backend]]:
    """Opens backends, which are closed at the end."""
    backends: list[S3Backend] = []

    def open_one(*args: object, **more: object) -> S3Backend:
        backends.append(S3Backend(options(*args, **more)))
        return backends[-1]

    with no_leaks():
        yield open_one
        for backend in backends:
            backend.close()


@pytest.fixture
def backend(server: S3Server, prefix: str, opened: Callable[..., S3Backend]) -> S3Backend:
    return opened(server.endpoint, prefix)


@pytest.fixture
def front(server: S3Server) -> Iterator[Front]:
    with Front(server.port) as front:
        yield front


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


class TestS3(BackendConformance):
    persistent = shared = True

    @pytest.fixture
    def raw(self, server: S3Server, prefix: str) -> RawObjects:
        return RawObjects(server.endpoint, prefix)

    @pytest.fixture
    def open_backend(self, server: S3Server, prefix: str) -> Callable[[], S3Backend]:
        return functools.partial(S3Backend, options(server.endpoint, prefix))


# Opening


@pytest.mark.parametrize(
    ("login", "bucket", "reason"),
    [
        (f"{KEY_ID}:not-the-secret@", BUCKET, "'cache' is not for these .* SignatureDoesNotMatch"),
        (f"nobody:{STRANGER_SECRET}@", BUCKET, "'cache' is not for these .* InvalidAccessKeyId"),
        (f"{STRANGER_ID}:{STRANGER_SECRET}@", BUCKET, "'cache' is not for these .* AccessDenied"),
        (LOGIN, "no-such-bucket", "'no-such-bucket' does not exist: .* NoSuchBucket"),
        (LOGIN, "x" * 300, "Invalid bucket name"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_a_config_error(
    server: S3Server, login: str, bucket: str, reason: str
) -> None:
    with no_leaks(), pytest.raises(Refused, match=reason) as caught:
        greet(lambda: S3Backend(options(server.endpoint, "x", bucket, login)))
    assert "secret" not in str(caught.value)


def test_no_credentials_are_a_config_error(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody(monkeypatch, tmp_path)
    with no_leaks(), pytest.raises(Refused, match="Unable to locate credentials"):
        greet(lambda: S3Backend(options(server.endpoint, "x", login="")))


def nobody(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Take away what this machine's own AWS tools would use."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "credentials"))


@pytest.mark.parametrize("source", ["environment", "profile"])
def test_credentials_come_from_where_the_client_library_looks(
    server: S3Server,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opened: Callable[..., S3Backend],
    source: str,
) -> None:
    nobody(monkeypatch, tmp_path)
    if source == "environment":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    else:
        text = f"[kv]\naws_access_key_id={KEY_ID}\naws_secret_access_key={SECRET}\n"
        (tmp_path / "credentials").write_text(text)
        monkeypatch.setenv("AWS_PROFILE", "kv")
    backend = opened(server.endpoint, prefix, login="")
    assert put(backend, 1) == 1
    assert get(backend, 1) == {1: value(1)}


def test_an_endpoint_that_is_down_or_hangs_opens_soon_and_works_later(
    server: S3Server, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    began = time.monotonic()
    down = opened(free_port(), prefix)
    with pytest.raises(StorageError, match="Could not connect"):
        down.ping(Transfer(5.0))
    assert time.monotonic() - began < 5.0
    with Proxy(server.port) as proxy:
        proxy.stall_after = 0
        began = time.monotonic()
        backend = opened(proxy.port, prefix)
        assert time.monotonic() - began < 2.5
        for call in (here, get, put):
            began = time.monotonic()
            with pytest.raises(TimeoutError, match=r"no answer within 0.2 s"):
                call(backend, 1, timeout=0.2)
            assert time.monotonic() - began < 1.5
        proxy.heal()
        assert put(backend, 1) == 1
        assert get(backend, 1) == {1: value(1)}
        backend.close()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"url": f"https://{LOGIN}cache"}, "expected s3://"),
        ({"url": f"s3://{KEY_ID}:{SECRET}@cache"}, "with / in a secret as %2F"),
        ({"url": "s3://cache/a b"}, "expected s3://"),
        ({"anonymous": True}, "either credentials in url or anonymous"),
        ({"endpoint": f"http://{LOGIN}127.0.0.1"}, "endpoint"),
        ({"tls": {"ca": __file__}}, "tls needs an endpoint that begins with https"),
        (
            {"endpoint": "https://a", "tls": {"check_hostname": False}},
            "check_hostname cannot be off",
        ),
        ({"endpoint": "https://a", "tls": {"key": __file__}}, "needs a tls.cert"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    changes: dict[str, object], reason: str
) -> None:
    fields = {
        "backend": "s3",
        "url": f"s3://{LOGIN}cache",
        "endpoint": "http://127.0.0.1",
        **changes,
    }
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config({"tiers": [fields]})
    assert SECRET not in str(caught.value)
    assert SECRET.replace("/", "%2F") not in str(caught.value)


def test_lmcaches_own_setting_names_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_REMOTE_URL", f"s3://{LOGIN}kv.example.com/team/a/")
    (tier,) = load_config().tiers
    assert tier.options.identity() == "s3://kv.example.com/team/a"
    assert "secret" not in repr(tier.options)


@pytest.mark.parametrize("file", ["ca", "cert"])
def test_a_certificate_that_cannot_be_read_is_a_config_error(tmp_path: Path, file: str) -> None:
    path = tmp_path / "empty"
    path.write_text("")
    with no_leaks(), pytest.raises(ConfigError, match="tls: a certificate or key cannot be used"):
        S3Backend(options("https://127.0.0.1:1", "x", tls={file: path}))


def test_an_endpoint_that_can_be_none_is_a_config_error() -> None:
    with no_leaks(), pytest.raises(Refused, match=r"url: Invalid endpoint: http://a\.\.host"):
        greet(lambda: S3Backend(options("http://a..host", "x")))


# What goes over the wire


def test_a_body_is_neither_signed_nor_announced_and_never_overwrites(
    front: Front, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    heads: list[dict[str, str]] = []

    def intervene(request: BaseHTTPRequestHandler) -> None:
        heads.append({name.lower(): text for name, text in request.headers.items()})

    backend = opened(front.port, prefix, region="eu-central-1")
    front.intervene = intervene
    assert put(backend, 1) == 1
    (head,) = heads
    assert head["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    assert head["if-none-match"] == "*"
    assert head["content-length"] == str(NBYTES)
    assert "/eu-central-1/s3/" in head["authorization"]
    assert not {"expect", "transfer-encoding", "content-md5"} & set(head)
    assert not [name for name in head if name.startswith("x-amz-checksum")]
    assert front.requests[-1] == f"PUT /{BUCKET}/{prefix}/{str(key(1))[-3:]}/{key(1)}"


def test_virtual_addressing_names_the_bucket_in_the_host(
    front: Front,
    prefix: str,
    opened: Callable[..., S3Backend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, hosts = socket.getaddrinfo, []

    def name_server(host: str, *args: object, **kwargs: object) -> object:
        return real("127.0.0.1" if host == f"{BUCKET}.s3.test" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", name_server)
    front.intervene = lambda request: hosts.append(request.headers["Host"])
    endpoint = f"http://s3.test:{front.port}"
    backend = opened(endpoint, prefix, addressing="virtual")
    assert put(backend, 1) == 1
    assert get(backend, 1) == {1: value(1)}
    assert set(hosts) == {f"{BUCKET}.s3.test:{front.port}"}
    assert front.requests[-1] == f"GET /{prefix}/{str(key(1))[-3:]}/{key(1)}"


def test_anonymous_signs_nothing(
    front: Front,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opened: Callable[..., S3Backend],
) -> None:
    nobody(monkeypatch, tmp_path)
    signed: list[str | None] = []
    front.intervene = lambda request: signed.append(request.headers["Authorization"])
    backend = opened(front.port, prefix, PUBLIC, "", anonymous=True)
    assert put(backend, 1, 2) == 2
    assert get(backend, 1, 2) == {1: value(1), 2: value(2)}
    backend.delete(keys(1, 2), Transfer(LONG))
    assert scan(backend) == []
    assert set(signed) == {None}
    with pytest.raises(Refused, match="not for these credentials"):
        greet(lambda: S3Backend(options(front.port, prefix, BUCKET, "", anonymous=True)))


def test_prefixes_keep_deployments_apart(
    server: S3Server, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    outer, inner = opened(server.endpoint, prefix), opened(server.endpoint, f"{prefix}/in")
    put(outer, 1)
    put(inner, 2)
    assert here(outer, 1, 2) == [True, False]
    assert here(inner, 1, 2) == [False, True]
    assert [stored.key for stored in scan(outer)] == [key(1)]
    assert [stored.key for stored in scan(inner)] == [key(2)]


def test_no_secret_is_shown(
    server: S3Server, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        backend = S3Backend(options(server.endpoint, prefix))
        put(backend, 1)
        get(backend, 1, 2)
        backend.close()
        with pytest.raises(Refused):
            greet(
                lambda: S3Backend(
                    options(server.endpoint, prefix, login=f"{KEY_ID}:{STRANGER_SECRET}@")
                )
            )
    shown = caplog.text + repr(backend._options) + repr(vars(backend))
    assert "botocore" in caplog.text
    for secret in (SECRET, SECRET.replace("/", "%2F"), STRANGER_SECRET):
        assert secret not in shown


# Lookups


def test_a_cold_lookup_asks_for_one_wave_and_a_hot_one_for_everything(
    front: Front, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    backend = opened(front.port, prefix)
    front.requests.clear()
    assert here(backend, *range(200)) == [False] * 200
    assert front.count("HEAD") == 16
    put(backend, *range(70), nbytes=1)
    front.requests.clear()
    assert here(backend, *range(200)) == [n < 70 for n in range(200)]
    assert front.count("HEAD") == 16 + 64 + 64  # the last found nothing


def test_a_hole_shorter_than_a_wave_hides_nothing(backend: S3Backend) -> None:
    stored = {*range(5), *range(15, 40), *range(60, 90)}
    put(backend, *stored, nbytes=1)
    assert here(backend, *range(100)) == [n in stored for n in range(100)]


def test_what_another_node_stores_is_seen_at_once(
    server: S3Server, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    one, two = opened(server.endpoint, prefix), opened(server.endpoint, prefix)
    for n in range(10):
        assert here(one, n) == [False]
        assert get(one, n) == {}
        put(two, n)
        assert here(one, n) == [True]
        assert get(one, n) == {n: value(n)}


# Loads


def test_a_frame_lands_in_the_callers_buffer(backend: S3Backend) -> None:
    put(backend, 1, nbytes=5 << 20)
    buffers: list[memoryview] = []

    def noting(nbytes: int) -> memoryview:
        buffers.append(allocate(nbytes))
        return buffers[-1]

    ((_, parts),) = backend.get([key(1)], Into(LONG, noting))
    assert [part.obj for part in parts] == [buffer.obj for buffer in buffers]
    assert b"".join(parts) == value(1, 5 << 20)


def test_a_load_reads_no_further_ahead_than_it_may(
    server: S3Server, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    backend = opened(server.endpoint, prefix, parallel=4)
    put(backend, *range(24))
    allocated, taken, ahead = 0, 0, []

    def counting(nbytes: int) -> memoryview:
        nonlocal allocated
        allocated += 1
        ahead.append(allocated - taken)
        return allocate(nbytes)

    for _ in backend.get(keys(*range(24)), Into(LONG, counting)):
        while allocated - taken < min(4, 24 - taken):
            time.sleep(0.001)
        taken += 1
    assert allocated == taken == 24
    assert max(ahead) == 4


def test_a_caller_that_takes_its_time_is_not_the_servers_fault(
    server: S3Server, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    backend = opened(server.endpoint, prefix, parallel=1)
    put(backend, 1, 2, 3)
    came, transfer = 0, Transfer(0.25)
    for _ in backend.get(keys(1, 2, 3), transfer):
        transfer.pause()
        came += 1
        time.sleep(0.3)
        transfer.wait()
    assert came == 3


def test_a_buffer_that_cannot_be_had_is_an_error(backend: S3Backend) -> None:
    put(backend, 1)

    def refuse(nbytes: int) -> memoryview:
        raise StorageError(f"a frame of {nbytes} bytes")

    with pytest.raises(StorageError, match=f"a frame of {NBYTES} bytes"):
        list(backend.get([key(1)], Into(LONG, refuse)))
    assert get(backend, 1) == {1: value(1)}


@pytest.fixture
def short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of more than a thousand bytes count as large."""
    monkeypatch.setattr(s3, "_RANGE", 1000)


@pytest.mark.usefixtures("short_ranges")
def test_a_few_large_frames_come_by_ranges_and_many_do_not(
    front: Front, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    backend = opened(front.port, prefix, parallel=4)
    sizes = [0, 1, 999, 1000, 1001, 3000, 3001]
    frames = [(key(n), [memoryview(value(n, size))]) for n, size in enumerate(sizes)]
    backend.put(frames, keys(*range(7)), Transfer(LONG))
    for n, size in enumerate(sizes):
        front.requests.clear()
        assert get(backend, n) == {n: value(n, size)}
        assert front.count("GET") == max(1, -(-size // 1000))
    front.requests.clear()
    assert get(backend, *range(7)) == {n: value(n, size) for n, size in enumerate(sizes)}
    assert front.count("GET") == 7


@pytest.mark.usefixtures("short_ranges")
def test_ranges_of_two_versions_are_never_one_frame(
    front: Front, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    backend = opened(front.port, prefix)
    put(backend, 1, nbytes=3000)
    raw = RawObjects(f"http://127.0.0.1:{front.port}", prefix)

    def overwrite(request: BaseHTTPRequestHandler) -> None:
        if request.headers["Range"] == "bytes=1000-1999":
            front.intervene = lambda request: None
            raw.write(key(1), value(2, 3000))

    front.intervene = overwrite
    with pytest.raises(StorageError, match="PreconditionFailed"):
        get(backend, 1)
    assert get(backend, 1) == {1: value(2, 3000)}


@pytest.mark.usefixtures("short_ranges")
def test_a_server_without_ranges_sends_it_all(
    front: Front, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    backend = opened(front.port, prefix, PUBLIC, "", anonymous=True)
    put(backend, 1, nbytes=3000)

    def without(request: BaseHTTPRequestHandler) -> None:
        del request.headers["Range"]

    front.intervene = without
    assert get(backend, 1) == {1: value(1, 3000)}
    backend.delete([key(1)], Transfer(LONG))


# Stores


@pytest.mark.parametrize("nbytes", [1000, 6 << 20])
def test_of_nodes_that_store_one_chunk_one_writes_it(
    server: S3Server, prefix: str, opened: Callable[..., S3Backend], nbytes: int
) -> None:
    nodes = [opened(server.endpoint, prefix) for _ in range(3)]
    reader = opened(server.endpoint, prefix)
    for n in range(4):

        def store(node: int, n: int = n) -> int:
            return nodes[node].put(
                [(key(n), [memoryview(value(node, nbytes))])], [key(n)], Transfer(LONG)
            )

        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(store, range(3))) == [1, 1, 1]
        won = get(reader, n)[n]
        assert won in [value(node, nbytes) for node in range(3)]
        assert [store(node) for node in range(3)] == [1, 1, 1]
        assert get(reader, n)[n] == won


class Broken(list[memoryview]):
    """Parts of which the last turns out to be gone when they are sent."""

    looks = 0

    def __iter__(self) -> Iterator[memoryview]:
        self.looks += 1
        yield from super().__iter__()
        if self.looks > 1:
            raise ValueError("gone")


def test_a_frame_that_breaks_off_while_it_is_sent_leaves_nothing(backend: S3Backend) -> None:
    parts = Broken([memoryview(value(1, 1 << 20)), memoryview(b"x" * 100)])
    with pytest.raises(StorageError):
        backend.put([(key(1), parts)], [key(1)], Transfer(5.0))
    assert parts.looks == 2
    assert here(backend, 1) == [False]
    assert put(backend, 1) == 1
    assert get(backend, 1) == {1: value(1)}


@pytest.mark.parametrize("refusal", [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_a_server_without_conditions_is_asked_first(
    front: Front, prefix: str, opened: Callable[..., S3Backend], refusal: Answer
) -> None:
    front.intervene = lambda request: refusal if request.headers["If-None-Match"] else None
    backend = opened(front.port, prefix)
    assert put(backend, 1) == 1
    front.requests.clear()
    assert put(backend, 1, 2) == 2
    assert get(backend, 1, 2) == {1: value(1), 2: value(2)}
    assert (front.count("HEAD"), front.count("PUT")) == (2, 1)  # and it is remembered


def test_a_refusal_that_has_nothing_to_do_with_the_condition_is_an_error(
    front: Front, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    backend = opened(front.port, prefix)
    front.intervene = lambda request: (403, "AccessDenied") if request.command == "PUT" else None
    with pytest.raises(StorageError, match=r"put_object: the server says AccessDenied \(403\)"):
        put(backend, 1)
    front.intervene = lambda request: (400, "InvalidRequest") if request.command == "PUT" else None
    with pytest.raises(StorageError, match=r"put_object: the server says InvalidRequest \(400\)"):
        put(backend, 1)
    front.intervene = lambda request: None
    front.requests.clear()
    assert put(backend, 1) == 1
    assert front.count("HEAD") == 0  # the condition is still in use


@pytest.mark.parametrize("full", [(507, "XMinioStorageFull"), (403, "QuotaExceeded"), (507, "Odd")])
def test_a_full_bucket_keeps_the_beginning(
    front: Front, prefix: str, opened: Callable[..., S3Backend], full: Answer
) -> None:
    backend = opened(front.port, prefix)
    last = str(key(3))
    front.intervene = lambda r: full if r.command == "PUT" and r.path.endswith(last) else None
    assert put(backend, 1, 2, 3, 4) == 2
    assert here(backend, 1, 2, 3) == [True, True, False]


def test_deletes_go_one_by_one_where_a_batch_is_not_understood(
    front: Front, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    backend = opened(front.port, prefix)
    put(backend, 1, 2, 3)
    front.intervene = lambda r: (400, "MissingContentMD5") if r.command == "POST" else None
    backend.delete(keys(1, 2, 9), Transfer(LONG))
    assert here(backend, 1, 2, 3) == [False, False, True]
    assert front.count("DELETE") == 3
    front.intervene = lambda r: (403, "AccessDenied") if r.command == "POST" else None
    with pytest.raises(StorageError, match="AccessDenied"):
        backend.delete(keys(1, 3), Transfer(LONG))


def test_more_keys_than_fit_in_one_answer(backend: S3Backend) -> None:
    many = keys(*range(1003))
    assert backend.put([(k, [memoryview(b"x")]) for k in many], many, Transfer(3 * LONG)) == len(
        many
    )
    assert {stored.key for stored in scan(backend)} == set(many)
    backend.delete(many, Transfer(LONG))
    assert scan(backend) == []


# Throttling


class Busy:
    """Says `answer` to the first `times` requests of each kind."""

    def __init__(self, times: float, answer: Answer = (503, "SlowDown")) -> None:
        self.times, self.answer, self.seen = times, answer, dict[str, int]()

    def __call__(self, request: BaseHTTPRequestHandler) -> Answer | None:
        self.seen[request.command] = self.seen.get(request.command, 0) + 1
        return self.answer if self.seen[request.command] <= self.times else None


@pytest.mark.parametrize(
    "answer", [(503, "SlowDown"), (500, "InternalError"), (409, "ConditionalRequestConflict")]
)
def test_a_busy_server_is_asked_again(
    front: Front, prefix: str, opened: Callable[..., S3Backend], answer: Answer
) -> None:
    backend = opened(front.port, prefix)
    busy = front.intervene = Busy(3, answer)
    assert put(backend, 1) == 1
    assert get(backend, 1) == {1: value(1)}
    assert busy.seen == {"PUT": 4, "GET": 4}


def test_a_server_that_stays_busy_costs_one_deadline_and_is_named(
    front: Front, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    backend = opened(front.port, prefix)
    backend.ping(Transfer(LONG))
    front.intervene = Busy(float("inf"))
    front.requests.clear()
    for call in (here, get, put):
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"the server says .*(SlowDown|503).*, for 0\.4 s"):
            call(backend, 1, timeout=0.4)
        assert 0.3 < time.monotonic() - began < 2.0
    assert len(front.requests) <= 3 * 6  # it backs off
    front.intervene = lambda request: None
    assert put(backend, 1) == 1


# Under an engine


def test_what_one_engine_stores_another_loads_and_damage_is_a_miss(
    server: S3Server, prefix: str
) -> None:
    url = f"s3://{LOGIN}{BUCKET}/{prefix}"
    tier = {"backend": "s3", "url": url, "endpoint": server.endpoint, "deadline": "5s"}
    group = LayerGroup(
        kind="attention", layers=(0, 1), kv_heads=2, key_dim=4, value_dim=4, dtype="float32"
    )

    def gather(index: int, out: Tensors) -> None:
        for tensor in out.values():
            tensor.fill_(index + 1)

    with (
        no_leaks(),
        lmcache_core.open({"chunk_size": 16, "tiers": [tier]}) as one,
        lmcache_core.open({"chunk_size": 16, "tiers": [tier]}) as two,
    ):
        namespace = one.namespace(
            model="m", layout=KVLayout(groups=(group,)), weights=unverified("test")
        )
        keys = one.keys(namespace, list(range(160)))
        assert two.lookup(keys).chunks == 0
        assert one.store(namespace, keys, gather) == 10
        one.flush()
        hit = two.lookup(keys)
        assert hit.chunks == 10
        for chunk in two.load(hit):
            assert all((tensor == chunk.index + 1).all() for tensor in chunk.tensors.values())
        raw = RawObjects(server.endpoint, prefix)
        raw.write(keys[4], raw.read(keys[4])[:-1] + b"!")
        assert [chunk.index for chunk in two.load(two.lookup(keys))] == [0, 1, 2, 3]
        assert two.stats()["missed", "damaged", "s3"] == 1
        assert two.flush(PATIENCE)  # nobody waits for it to be deleted
        assert raw.read(keys[4]) is None


# A network that fails


class TestServersAndNetworks(RemoteConformance):
    persistent, touches = True, False
    offsets = 8  # an S3 client takes long to make

    @pytest.fixture
    def opener(self, prefix: str) -> Opener:
        return lambda port: functools.partial(S3Backend, options(port, prefix, parallel=1))

    @pytest.fixture(name="server")
    def port_and_server(self, server: S3Server) -> Iterator[tuple[int, S3Server]]:
        yield server.port, server
        server.thaw()
        if not server.running:
            server.start()

    @pytest.fixture
    def proxy(self, server: tuple[int, S3Server]) -> Iterator[Proxy]:
        with Proxy(server[0]) as proxy:
            yield proxy


def test_garbage_is_an_error_or_stays_within_its_value(
    server: S3Server, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    chance = random.Random(1)
    backend = opened(server.endpoint, prefix)
    put(backend, 1, 2, nbytes=3000)
    for offset in [0, 5, 9, 12, 17, 40, 100, 200, 300, *(chance.randrange(900) for _ in range(12))]:
        with Proxy(server.port) as proxy:
            proxy.garble_at = (offset, chance.randbytes(8))
            damaged = S3Backend(options(proxy.port, prefix, parallel=1))
            try:
                got = get(damaged, 1, 2, timeout=0.5)
            except (StorageError, TimeoutError):
                got = {}
            proxy.heal()
            assert all(len(v) == 3000 for v in got.values())
            assert all(got[n] != value(3 - n, 3000) for n in got)
            assert here(damaged, 1, 2) == [True, True]
            damaged.close()


def test_what_moves_may_take_longer_and_what_crawls_may_not(
    proxy: Proxy, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    backend = opened(proxy.port, prefix, parallel=1)
    put(backend, 1, nbytes=32 << 20)
    proxy.rate = 24 << 20
    began = time.monotonic()
    assert get(backend, 1, timeout=1.0) == {1: value(1, 32 << 20)}
    assert time.monotonic() - began > 1.0
    proxy.rate = 2 << 20
    with pytest.raises(TimeoutError):
        get(backend, 1, timeout=0.5)
    assert time.monotonic() - began < 10


def test_eight_loads_of_two_streams_have_all_connections_that_they_want(
    proxy: Proxy, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    """One that waits for a connection hears nothing, like one whose server hangs."""
    backend = opened(proxy.port, prefix)
    numbers = range(16)
    put(backend, *numbers)
    proxy.stall_after, before = 0, proxy.connections
    with ThreadPoolExecutor(16) as threads, contextlib.ExitStack() as stack:
        calls = [threads.submit(get, backend, *numbers, timeout=PATIENCE) for _ in range(16)]
        stack.callback(proxy.heal)
        eventually(lambda: proxy.connections >= 16 * 16 - before)  # those were there
        proxy.heal()
        assert all(len(call.result()) == 16 for call in calls)


def test_cuts_under_threads_mix_nothing_up(
    proxy: Proxy, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    backend = opened(proxy.port, prefix)
    numbers = list(range(12))
    put(backend, *numbers, nbytes=100_000)
    proxy.cut_after = 250_000
    whole, cut = [], []

    def work(seed: int) -> None:
        for _ in range(10):
            try:
                for i, parts in backend.get(keys(*numbers), Transfer(LONG)):
                    assert b"".join(parts) == value(numbers[i], 100_000)
                    whole.append(i)
            except StorageError:
                cut.append(seed)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert whole
    assert cut


# A server that fails


def test_a_server_that_hangs_costs_one_deadline_and_does_not_hold_close(
    server: S3Server, prefix: str, opened: Callable[..., S3Backend]
) -> None:
    backend, other = opened(server.endpoint, prefix), opened(server.endpoint, prefix)
    put(backend, 1, 2)
    load = other.get(keys(1, 2), Transfer(60.0))
    server.freeze()
    try:
        for call in (here, get, put):
            began = time.monotonic()
            with pytest.raises(TimeoutError, match=r"no answer within 0\.3 s"):
                call(backend, 1, 3, timeout=0.3)
            assert time.monotonic() - began < 1.5
        with pytest.raises(TimeoutError):
            backend.ping(Transfer(0.3))
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(next, load)
            began = time.monotonic()
            other.close()
            with pytest.raises(StorageError, match="closed"):
                waiting.result()
        assert time.monotonic() - began < 2
    finally:
        server.thaw()
    assert put(backend, 3) == 1
    assert get(backend, 1, 3) == {1: value(1), 3: value(3)}


def test_a_closed_backend_says_so(server: S3Server, prefix: str) -> None:
    backend = S3Backend(options(server.endpoint, prefix))
    backend.close()
    backend.close()
    for call in (here, get, put):
        with pytest.raises(StorageError, match="closed"):
            call(backend, 1)


def test_calls_while_it_closes_work_or_fail_and_never_hang(server: S3Server, prefix: str) -> None:
    for _ in range(10):
        backend = S3Backend(options(server.endpoint, prefix))
        closing = threading.Barrier(4)

        def work(backend: S3Backend = backend, closing: threading.Barrier = closing) -> str:
            closing.wait()
            try:
                while True:
                    here(backend, 1)
            except StorageError as error:
                return str(error)

        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(work) for _ in range(3)]
            closing.wait()
            backend.close()
            assert [job.result(10) for job in jobs] == ["closed"] * 3


# TLS


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def terminating(pair: Pair, clients: Path | None = None) -> ssl.SSLContext:
    """A server's side; where `clients` is given, only clients with a certificate of it may in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients)
    return context


def test_tls_with_an_own_authority_and_a_clients_certificate(
    server: S3Server, prefix: str, authority: Authority, opened: Callable[..., S3Backend]
) -> None:
    cert, key_file = authority.issue("client")
    context = terminating(authority.issue("server", "127.0.0.1"), authority.ca)
    with Front(server.port, context) as front:
        tls = {"ca": authority.ca, "cert": cert, "key": key_file}
        backend = opened(f"https://127.0.0.1:{front.port}", prefix, tls=tls)
        assert put(backend, 1, nbytes=3 << 20) == 1
        assert get(backend, 1) == {1: value(1, 3 << 20)}
        without = opened(f"https://127.0.0.1:{front.port}", prefix, tls={"ca": authority.ca})
        with pytest.raises(StorageError):
            without.ping(Transfer(5.0))
        backend.close()


@pytest.mark.parametrize("trouble", ["a stranger's authority", "another host"])
def test_a_certificate_that_proves_nothing_is_a_config_error(
    server: S3Server, authority: Authority, tmp_path: Path, trouble: str
) -> None:
    host = "elsewhere.test" if trouble == "another host" else "127.0.0.1"
    trusted = authority if trouble == "another host" else Authority(tmp_path, "stranger")
    with Front(server.port, terminating(authority.issue("server", host))) as front:
        endpoint = f"https://127.0.0.1:{front.port}"
        with no_leaks(), pytest.raises(Refused, match=r"(?i)certificate verify failed"):
            greet(lambda: S3Backend(options(endpoint, "x", tls={"ca": trusted.ca})))
