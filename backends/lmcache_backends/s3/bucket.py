"""A bucket: requests to it, made again while its server is busy, and the client library's errors as
ours, which hold no secret."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from typing import Any

import aiohttp
from aiobotocore.session import AioSession
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    ValidationError,
)
from botocore.handlers import add_expect_header

from lmcache_backends._net.connection import of_tls
from lmcache_core.backend import Backoff, Refused, StorageError, Transfer

_PAUSES = (0.05, 1.0)
"""Seconds before a request is tried again: at first, doubled up to the second."""
_BUSY = {"SlowDown", "ServiceUnavailable", "RequestLimitExceeded", "InternalError"}
_BUSY |= {"ConditionalRequestConflict", "OperationAborted", "429", "503"}
"""What a server says when the same request may work a moment later."""
_MISTAKES = (
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    ValidationError,
)
"""What only another configuration helps against."""
_LOADER = AioSession().get_component("data_loader")
"""Keeps the description of S3's protocol, a megabyte to parse, for every backend."""


class HttpError(StorageError):
    """The server answered, and the answer is no."""

    def __init__(self, operation: str, status: int, code: str) -> None:
        super().__init__(f"{operation}: the server says {code} ({status})")
        self.status, self.code = status, code

    def says(self, codes: set[str]) -> bool:
        """Whether this is one of `codes`: names, or statuses where there is no body to name it."""
        return self.code in codes or str(self.status) in codes


class Bucket:
    """A bucket by its name, all on one event loop."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        """`settings`: what the client library's `create_client` takes."""
        self.name = name
        self._settings = settings
        self._connecting: asyncio.Task[Any] | None = None

    def __repr__(self) -> str:
        return f"<Bucket {self.name}>"

    async def ask(self, operation: str, transfer: Transfer, **parameters: Any) -> Any:
        """A request, made again for as long as the server is busy and the call has time."""
        pauses = Backoff(*_PAUSES)
        while True:
            try:
                with told(operation):
                    client = await self._client()
                    return await getattr(client, operation)(Bucket=self.name, **parameters)
            except HttpError as error:
                if not error.says(_BUSY):
                    raise
                transfer.answer = str(error)
            await asyncio.sleep(pauses.next() * random.uniform(0.5, 1.0))

    async def _client(self) -> Any:
        task = self._connecting
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._connecting = asyncio.create_task(self._connect())
        return await asyncio.shield(task)  # a call that is late does not end it for others

    async def _connect(self) -> Any:
        session = AioSession()
        session.register_component("data_loader", _LOADER)
        region = self._settings["region_name"] or session.get_config_variable("region")
        settings = {**self._settings, "region_name": region or "us-east-1"}
        try:
            client = await session.create_client("s3", **settings).__aenter__()
        except ValueError as error:  # an endpoint that is none
            raise Refused(str(error)) from None
        # A server that never says "100 Continue" would be waited for, and others cost a round trip.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        return client

    async def close(self) -> None:
        """Close the connections."""
        task = self._connecting
        if task is not None and task.done() and not task.cancelled() and not task.exception():
            await task.result().__aexit__(None, None, None)


@contextlib.contextmanager
def told(operation: str) -> Iterator[None]:
    """What the client library raises, as errors of ours, which hold no secret."""
    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "an error")
        raise HttpError(operation, status, code) from None
    except _MISTAKES as error:
        raise Refused(of_tls(error)) from None
    except (BotoCoreError, aiohttp.ClientError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise StorageError(f"{operation}: {text or type(error).__name__}") from None
