"""s3: a bucket of Amazon S3, or of anything that speaks its protocol.

    <prefix>/<3 hex digits>/<64 hex digits>     a whole frame, one object a chunk

The three digits are the last of the key, so of a hash: S3 divides a bucket among its machines by
the beginnings of names, and grants each part a rate of requests of its own. A key itself begins
with its namespace, which one model's chunks share.

An object is there whole or not at all. It is put on the condition that none of its name is there
(If-None-Match), so that of several nodes with the same chunk one stores it. Frames have their own
checksum; those of S3's clients, which cost a pass over all bytes, are left out, and bodies are not
signed. Which chunks stay is the affair of the bucket's lifecycle rules: nothing here has a `ttl`,
a use leaves no trace, and no answer is remembered, so what another node stores is seen at once.

Lookup: S3 has no request for many names (a list has an order of its own, and costs more), so each
key is one HEAD, many at a time. The first wave is small; after a wave in which nothing was found
the rest counts as absent without being asked for. That costs a cold prompt 16 requests, however
long it is. Chunks behind such a hole are of no use, unless a slower tier has those in it.

aiobotocore runs on an event loop on a thread of its own. Callers wait for it; what is late is
cancelled there.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, NamedTuple

from aiobotocore.config import AioConfig
from botocore import UNSIGNED

from lmcache_backends._net.options import Tls
from lmcache_backends.s3.bucket import Bucket, HttpError, told
from lmcache_backends.s3.loop import Loop, ended_by, result, together
from lmcache_backends.s3.options import S3Options, Url, parse_url
from lmcache_core.backend import (
    Buffers,
    ChunkKey,
    DeadlineExceeded,
    Refused,
    StorageBackend,
    StorageError,
    Stored,
    Transfer,
    nbytes_of,
)

_FIRST_WAVE, _WAVE = 16, 64
"""HEADs at a time: at first, and then."""
_AT_ONCE = 8
"""Calls that have all connections they want; with more, some wait for those of others."""
_DELETES = 1000
"""Keys in one DeleteObjects: the most that S3 takes."""
_RANGE = 8 << 20
"""Bytes that one connection is asked for where frames are fewer than connections. Each connection
has a limit of its own in S3: with 20 MB/s each, two frames of 16 MiB come at 73 MB/s and not 37.
Where this machine is the limit instead, ranges cost a tenth to a third of the speed."""
_PIECE = 256 << 10
"""Bytes handed to a connection at a time; what its socket does not take at once is copied."""
_SMALL = 16 << 10
"""Parts below this are joined, so that each does not cost a packet."""
_FULL = {"QuotaExceeded", "InsufficientCapacity", "InsufficientStorage", "507"}
_FULL |= {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
_UNKNOWN = {"NotImplemented", "InvalidArgument", "InvalidRequest", "MissingContentMD5", "501"}
"""What a server says to a request that only others understand."""
_FORBIDDEN = "is not for these credentials (needs ListBucket, GetObject, PutObject, DeleteObject)"


class S3Backend(StorageBackend):
    """Frames as objects of a bucket."""

    Options = S3Options
    schemes = ("s3",)
    medium = "object store"

    def __init__(self, options: S3Options) -> None:
        url = parse_url(options.url.get_secret_value())
        if options.tls != Tls():
            options.tls.context()  # the client library tells of its files at the first request
        self._options = options
        self._bucket, self._prefix = Bucket(url.bucket, _settings(options, url)), url.prefix
        self._conditional = True
        self._loop = Loop("lmcache-s3")

    def __repr__(self) -> str:
        return f"<S3Backend: {self._bucket!r}, {self._loop!r}>"

    def contains(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        return self._loop.call(self._find(keys, transfer))

    def get(self, keys: Sequence[ChunkKey], transfer: Transfer) -> Iterator[tuple[int, Buffers]]:
        arrived: queue.SimpleQueue[tuple[int, Buffers] | None] = queue.SimpleQueue()
        slots = asyncio.Semaphore(self._options.parallel)
        split = len(keys) < self._options.parallel
        load = _Load(keys, transfer, split, slots, arrived)
        job = self._loop.submit(self._load(load))
        job.add_done_callback(lambda _: arrived.put(None))
        try:
            while (item := arrived.get()) is not None:
                yield item
                del item
                self._loop.soon(slots.release)
            result(job)
        finally:
            job.cancel()

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> int:
        return self._loop.call(self._store(frames, transfer))

    def delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        self._loop.call(self._remove([self._name(key) for key in keys], transfer))

    def scan(self, transfer: Transfer) -> Iterator[Stored]:
        name = re.compile(rf"{re.escape(self._prefix)}/([0-9a-f]{{3}})/([0-9a-f]{{61}}\1)")
        more: dict[str, Any] = {}
        while True:
            page = self._loop.call(self._list(more, transfer))
            for entry in page.get("Contents", ()):
                if match := name.fullmatch(entry["Key"]):
                    yield Stored(ChunkKey.parse(match[2]), entry["Size"])
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def ping(self, transfer: Transfer) -> None:
        try:  # a list, for the answer to a HEAD would not tell the reason
            self._loop.call(self._list({"MaxKeys": 1}, transfer))
        except Refused as error:
            raise Refused(f"url: {error}") from None
        except HttpError as error:
            if 400 <= error.status < 500 or error.status == 301:
                raise Refused(self._problem(error)) from None
            raise

    def close(self) -> None:
        self._loop.close(self._bucket.close)

    def _problem(self, error: HttpError) -> str:
        """What makes the configuration useless."""
        reasons = {
            404: "does not exist",
            403: _FORBIDDEN,
            401: _FORBIDDEN,
            301: "is in another region",
        }
        reason = reasons.get(error.status, "cannot be used")
        return f"url: the bucket {self._bucket.name!r} {reason}: {error}"

    def _name(self, key: ChunkKey) -> str:
        text = str(key)
        return f"{self._prefix}/{text[-3:]}/{text}"

    # On the loop

    async def _find(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        found: list[bool] = []
        async with ended_by(transfer):
            while len(found) < len(keys):
                wave = keys[len(found) :][: _WAVE if found else _FIRST_WAVE]
                answers = await together(self._is_there(self._name(key), transfer) for key in wave)
                found += answers
                if not any(answers):
                    break
        return found + [False] * (len(keys) - len(found))

    async def _is_there(self, name: str, transfer: Transfer) -> bool:
        try:
            await self._bucket.ask("head_object", transfer, Key=name)
        except HttpError as refused:
            if refused.status == 404:
                return False
            raise
        return True

    async def _load(self, load: _Load) -> None:
        async with ended_by(load.transfer):
            await together(self._load_one(load, i) for i in range(len(load.keys)))

    async def _load_one(self, load: _Load, i: int) -> None:
        """A slot is taken here, and given back by whoever takes the frame."""
        await load.slots.acquire()
        frame = await self._read(self._name(load.keys[i]), load)
        if frame is None:
            load.slots.release()
        else:
            load.arrived.put((i, [frame]))

    async def _read(self, name: str, load: _Load) -> memoryview | None:
        """The first range tells the size; what a large frame has beyond it is read beside it."""
        part = {"Range": _range(0)} if load.split else {}
        try:
            first = await self._bucket.ask("get_object", load.transfer, Key=name, **part)
        except HttpError as refused:
            if refused.status == 416:  # what is empty has no first byte
                return memoryview(b"")
            if refused.status == 404:
                return None
            raise
        here = first["ContentLength"]
        async with first["Body"]:  # closes the connection where bytes are left in it
            nbytes = int(first.get("ContentRange", f"/{here}").rpartition("/")[2])
            if nbytes > load.transfer.limit:
                return memoryview(b"")  # not a frame, which the tier finds out and removes
            buffer = load.transfer.allocate(nbytes)
            rest = [
                self._read_range(name, at, buffer[at : at + _RANGE], first["ETag"], load)
                for at in range(here, nbytes, _RANGE)
            ]
            await together([_fill(buffer[:here], first["Body"], load), *rest])
        return buffer

    async def _read_range(
        self, name: str, at: int, target: memoryview, version: str, load: _Load
    ) -> None:
        part = {"Range": _range(at), "IfMatch": version}  # all parts of one object, or an error
        answer = await self._bucket.ask("get_object", load.transfer, Key=name, **part)
        async with answer["Body"]:
            if answer["ContentLength"] != target.nbytes:
                raise StorageError(f"{answer['ContentLength']} bytes of {target.nbytes} came")
            await _fill(target, answer["Body"], load)

    async def _store(self, frames: Sequence[tuple[ChunkKey, Buffers]], transfer: Transfer) -> int:
        slots = asyncio.Semaphore(self._options.parallel)

        async def one(key: ChunkKey, parts: Buffers) -> bool:
            async with slots:
                return await self._store_one(self._name(key), parts, transfer)

        async with ended_by(transfer):
            stored = await together(one(key, parts) for key, parts in frames)
        return [*stored, False].index(False)

    async def _store_one(self, name: str, parts: Buffers, transfer: Transfer) -> bool:
        """False where the store is full."""
        try:
            if self._conditional and await self._put_if_absent(name, parts, transfer):
                return True
            if not await self._is_there(name, transfer):
                await self._put(name, parts, transfer)
                self._conditional = False  # it works without, so that was not understood
        except HttpError as refused:
            if refused.says(_FULL):
                return False
            raise
        return True

    async def _put_if_absent(self, name: str, parts: Buffers, transfer: Transfer) -> bool:
        """False where the server does not understand the condition."""
        try:
            await self._put(name, parts, transfer, IfNoneMatch="*")
        except HttpError as refused:
            if refused.says(_UNKNOWN):
                return False
            if refused.status != 412:
                raise
        return True

    async def _put(self, name: str, parts: Buffers, transfer: Transfer, **condition: str) -> None:
        body = _Body(parts, transfer)
        size = {"ContentLength": body.nbytes}
        await self._bucket.ask("put_object", transfer, Key=name, Body=body, **size, **condition)

    async def _remove(self, names: Sequence[str], transfer: Transfer) -> None:
        async with ended_by(transfer):
            for at in range(0, len(names), _DELETES):
                await self._remove_some(names[at : at + _DELETES], transfer)

    async def _remove_some(self, names: Sequence[str], transfer: Transfer) -> None:
        """In one request; one by one where the server knows none such, or wants an MD5 for it."""
        if len(names) > 1:
            batch = {"Objects": [{"Key": name} for name in names], "Quiet": True}
            try:
                answer = await self._bucket.ask("delete_objects", transfer, Delete=batch)
            except HttpError as refused:
                if not refused.says(_UNKNOWN):
                    raise
            else:
                for error in answer.get("Errors", ()):
                    raise HttpError("delete_objects", 200, error.get("Code", "an error"))
                return
        await together(self._bucket.ask("delete_object", transfer, Key=name) for name in names)

    async def _list(self, more: dict[str, Any], transfer: Transfer) -> Any:
        async with ended_by(transfer):
            more = {"Prefix": f"{self._prefix}/", **more}
            return await self._bucket.ask("list_objects_v2", transfer, **more)


class _Load(NamedTuple):
    """One `get`: what the loop and the waiting thread share."""

    keys: Sequence[ChunkKey]
    transfer: Transfer
    split: bool
    """Read a large frame by ranges, for connections are left over."""
    slots: asyncio.Semaphore
    """One for each frame that is read, or lies in `arrived`, or is in the caller's hands."""
    arrived: queue.SimpleQueue[tuple[int, Buffers] | None]


class _Body:
    """A frame's parts, sent from where they lie. The client library wants a `read`; none calls it,
    for aiohttp iterates."""

    def __init__(self, parts: Buffers, transfer: Transfer) -> None:
        self.nbytes = nbytes_of(parts)
        self._parts, self._transfer = parts, transfer

    def read(self) -> bytes:
        raise NotImplementedError

    async def __aiter__(self) -> AsyncIterator[memoryview | bytearray]:
        small = bytearray()
        for part in self._parts:
            if part.nbytes < _SMALL:
                small += part
                if len(small) < _SMALL:
                    continue
                part = memoryview(b"")
            if small:
                yield small
                small = bytearray()
            for at in range(0, part.nbytes, _PIECE):
                yield part[at : at + _PIECE]
                with contextlib.suppress(DeadlineExceeded):  # which ends the request itself
                    self._transfer.moved(_PIECE)
        if small:
            yield small


def _settings(options: S3Options, url: Url) -> dict[str, Any]:
    """The options as the client library takes them."""
    files = tuple(str(path) for path in (options.tls.cert, options.tls.key) if path)
    config = AioConfig(
        signature_version=UNSIGNED if options.anonymous else None,
        s3={"addressing_style": options.addressing, "payload_signing_enabled": False},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"total_max_attempts": 1},
        max_pool_connections=_AT_ONCE * max(options.parallel, _WAVE),
        client_cert=(files if len(files) == 2 else files[0]) if files else None,
    )
    return {
        "region_name": options.region,
        "endpoint_url": options.endpoint,
        "aws_access_key_id": url.key_id,
        "aws_secret_access_key": url.secret,
        "verify": str(options.tls.ca) if options.tls.ca else None,
        "config": config,
    }


def _range(start: int) -> str:
    return f"bytes={start}-{start + _RANGE - 1}"


async def _fill(buffer: memoryview, body: Any, load: _Load) -> None:
    """Read a body of just that size."""
    filled = 0
    while filled < buffer.nbytes:
        with told("get_object"):
            n = await body.readinto(buffer[filled:])
        if n == 0:
            raise StorageError(f"{filled} bytes of {buffer.nbytes} came")
        load.transfer.moved(n)
        filled += n
