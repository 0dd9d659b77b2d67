"""A real S3 server (SeaweedFS), and an HTTP front that does to requests what clouds do."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from tests.servers import Server, free_port, program, running

BUCKET, OTHER, PUBLIC = "cache", "other", "public"
"""Buckets that are there. Anybody may use the last."""
KEY_ID, SECRET = "owner", "secret/of+the=owner"
"""Of somebody who may do everything."""
STRANGER_ID, STRANGER_SECRET = "stranger", "secret-of-the-stranger"
"""Of somebody who may use OTHER and nothing else."""

_RIGHTS = ("Read", "Write", "List", "Tagging")
_IDENTITIES = [
    {
        "name": "owner",
        "credentials": [{"accessKey": KEY_ID, "secretKey": SECRET}],
        "actions": ["Admin", *_RIGHTS],
    },
    {
        "name": "stranger",
        "credentials": [{"accessKey": STRANGER_ID, "secretKey": STRANGER_SECRET}],
        "actions": [f"{right}:{OTHER}" for right in _RIGHTS],
    },
    {"name": "anonymous", "actions": [f"{right}:{PUBLIC}" for right in _RIGHTS]},
]
_SESSION = boto3.Session()


class S3Server(Server):
    """SeaweedFS in `folder`, with its buckets."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        identities = folder / "identities.json"
        identities.write_text(json.dumps({"identities": _IDENTITIES}))
        (folder / "data").mkdir()
        self.ports = {
            f"{server}.port{kind}": free_port()
            for server in ("master", "volume", "filer", "s3")
            for kind in ("", ".grpc")
        }
        self.ports["s3.port"] = self.port
        ports = [f"-{name}={port}" for name, port in self.ports.items()]
        command = [
            *(
                program("weed"),
                "-logtostderr",
                "server",
                f"-dir={folder / 'data'}",
                "-ip=127.0.0.1",
                *ports,
            ),
            *("-master.telemetry=false", "-master.volumeSizeLimitMB=512", "-volume.max=100"),
            *("-master.electionTimeout=1s", "-master.heartbeatInterval=50ms"),  # starts in 3 s
            *("-filer", "-s3", f"-s3.config={identities}", "-s3.domainName=s3.test"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        ]
        super().__init__(command, self._make_buckets, folder / "log")

    @property
    def endpoint(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.port}"

    def _make_buckets(self) -> None:
        urllib.request.urlopen(self.endpoint, timeout=1.0).close()
        with client(self.endpoint) as s3:
            have = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
            for bucket in {BUCKET, OTHER, PUBLIC} - have:
                s3.create_bucket(Bucket=bucket)
            s3.put_object(Bucket=BUCKET, Key="ready", Body=b"x")  # a volume takes writes


@contextlib.contextmanager
def client(endpoint: str) -> Iterator[Any]:
    """boto3's client: another way to a bucket than the backend's."""
    s3 = _SESSION.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
    )
    try:
        yield s3
    finally:
        s3.close()


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """A server that runs."""
    server = S3Server(folder)
    with running(server):
        yield server
    for port in server.ports.values():  # which SeaweedFS leaves behind when it is killed
        for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left.unlink()


Answer = tuple[int, str]
"""Status, and the code in the body."""


class Front:
    """An HTTP proxy before a server. `intervene` sees each request, and may answer it itself."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.intervene: Callable[[BaseHTTPRequestHandler], Answer | None] = lambda request: None
        self.requests: list[str] = []
        """Method and path of all that came."""
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def do_GET(self) -> None:
                front._handle(self, port)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # so that closing waits for them
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def __enter__(self) -> Front:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def count(self, method: str) -> int:
        """How many requests of a method came."""
        return sum(request.startswith(f"{method} ") for request in self.requests)

    def _handle(self, request: BaseHTTPRequestHandler, port: int) -> None:
        self.requests.append(f"{request.command} {request.path}")
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        answer = self.intervene(request)
        if answer is None:
            return _forward(request, body, port)
        status, code = answer
        text = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        _reply(request, status, {}, text)


def _forward(request: BaseHTTPRequestHandler, body: bytes, port: int) -> None:
    server = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        server.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            server.putheader(name, value)
        server.endheaders(body)
        response = server.getresponse()
        _reply(request, response.status, dict(response.headers), response.read())
    finally:
        server.close()


def _reply(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes
) -> None:
    request.send_response_only(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        if name != "Transfer-Encoding":
            request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
