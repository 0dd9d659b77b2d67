"""S3 for bench-remote: the least that aiobotocore can do, and boto3 as it comes.

The bare loop's client is set up as the backend's (nothing signed or checked over the body, one
request tried once), its values are one `bytes` each, and a load drops what it read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import boto3
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession

PARALLEL = 16
"""Requests at once: the backend's default."""
STOCK_THREADS = 10
"""What boto3's own transfer manager uses."""


class Bucket(NamedTuple):
    """Where to load and store, as whom."""

    endpoint: str
    name: str
    key_id: str
    secret: str

    def login(self) -> dict[str, Any]:
        """Arguments that both client libraries take."""
        return {
            "endpoint_url": self.endpoint,
            "region_name": "us-east-1",
            "aws_access_key_id": self.key_id,
            "aws_secret_access_key": self.secret,
        }


class Bare:
    """A client of aiobotocore on a loop of the calling thread, with `parallel` requests at once."""

    def __init__(self, bucket: Bucket, parallel: int = PARALLEL) -> None:
        self._bucket, self._parallel = bucket.name, parallel
        self._runner = asyncio.Runner()
        config = AioConfig(
            s3={"addressing_style": "path", "payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"total_max_attempts": 1},
            max_pool_connections=parallel,
        )
        made = AioSession().create_client("s3", config=config, **bucket.login())
        self._client = self._runner.run(made.__aenter__())

    def load(self, names: Sequence[str]) -> None:
        """GET every object."""

        async def one(name: str) -> None:
            answer = await self._client.get_object(Bucket=self._bucket, Key=name)
            await answer["Body"].read()

        self._all([one(name) for name in names])

    def store(self, names: Sequence[str], value: bytes) -> None:
        """PUT `value` under every name."""

        async def one(name: str) -> None:
            await self._client.put_object(Bucket=self._bucket, Key=name, Body=value)

        self._all([one(name) for name in names])

    def lookup(self, names: Sequence[str]) -> None:
        """HEAD every object."""

        async def one(name: str) -> None:
            await self._client.head_object(Bucket=self._bucket, Key=name)

        self._all([one(name) for name in names])

    def close(self) -> None:
        """Close connections and loop."""
        self._runner.run(self._client.__aexit__(None, None, None))
        self._runner.close()

    def _all(self, work: Sequence[Any]) -> None:
        async def run() -> None:
            slots = asyncio.Semaphore(self._parallel)

            async def one(each: Any) -> None:
                async with slots:
                    await each

            await asyncio.gather(*[one(each) for each in work])

        self._runner.run(run())


class Stock:
    """boto3 with its defaults, called from as many threads as its transfer manager has."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket.name
        self._client = boto3.client("s3", **bucket.login())
        self._threads = ThreadPoolExecutor(STOCK_THREADS)

    def load(self, names: Sequence[str]) -> None:
        """GET every object."""
        get = self._client.get_object
        list(self._threads.map(lambda n: get(Bucket=self._bucket, Key=n)["Body"].read(), names))

    def store(self, names: Sequence[str], value: bytes) -> None:
        """PUT `value` under every name."""
        put = self._client.put_object
        list(self._threads.map(lambda n: put(Bucket=self._bucket, Key=n, Body=value), names))

    def lookup(self, names: Sequence[str]) -> None:
        """HEAD every object."""
        head = self._client.head_object
        list(self._threads.map(lambda n: head(Bucket=self._bucket, Key=n), names))

    def close(self) -> None:
        """Close connections and threads."""
        self._threads.shutdown()
        self._client.close()
