"""s3: the conformance suite on a real server, and what only S3 can suffer."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator

import pytest

from lmcache_backends.s3 import S3Backend, S3Options
from lmcache_core import ChunkKey
from lmcache_core.testing import BackendConformance
from tests.s3_server import BUCKET, KEY_ID, SECRET, S3Server, client, s3_server

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
    endpoint: str, prefix: str, bucket: str = BUCKET, login: str = LOGIN, **more
) -> S3Options:
    return S3Options(url=f"s3://{login}{bucket}/{prefix}", endpoint=endpoint, **more)


class TestS3(BackendConformance):
    persistent = shared = True

    @pytest.fixture
    def raw(self, server: S3Server, prefix: str) -> RawObjects:
        return RawObjects(server.endpoint, prefix)

    @pytest.fixture
    def open_backend(self, server: S3Server, prefix: str) -> Callable[[], S3Backend]:
        return functools.partial(S3Backend, options(server.endpoint, prefix))
