"""A tier behind vLLM's own CPU offloading: Redis, memcached, S3 and disks.

vLLM keeps what it offloads in rows of host memory, one a chunk, each with the bytes of all workers.
It hands this tier keys and the numbers of rows. A row is stored as it is, as a chunk of one token
that is as wide as the row.

vLLM calls all of this on its scheduler's thread, so nothing here waits: lookups, loads and stores
run on threads of their own. What cannot be loaded is a miss, what cannot be stored is dropped.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.metrics.cache_hit_source import CacheHitSource

import lmcache_core
from lmcache_connectors.vllm.identity import offloaded
from lmcache_connectors.vllm.weights import Workers
from lmcache_core import ChunkKey, Config, ConfigError, Weights
from lmcache_core.connector import LOG, DaemonPool, Rows, go_on_without, is_strict, read_config
from lmcache_core.serde import TensorsToTensors

log = logging.getLogger("vllm.lmcache_core")

LOADERS = 8
_Outcome = tuple[int, float]
"""How many of a job's rows, from the first, were moved, and the seconds that took."""


class LmcacheCoreTier(SecondaryTierManager):
    """vLLM's SecondaryTierManager over a CacheEngine.

    Its entry in `secondary_tiers` holds `config_file`, or the keys of one (`tiers`); without either
    the environment says. `strict`: what makes reuse impossible, such as a store that does not
    answer, is an error at start, not a log line.
    """

    medium: ClassVar[Medium] = Medium.STORAGE
    cache_hit_source: ClassVar[CacheHitSource] = CacheHitSource.EXTERNAL_UNSPECIFIED
    """A disk here or a server elsewhere."""

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        strict: bool = False,
        locality: str | None = None,
        **config: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        strict = is_strict({"strict": strict, **config})
        self.locality = Locality(locality) if locality else None
        self._jobs: dict[int, tuple[TransferJob, Future[_Outcome]]] = {}
        self._chains: dict[str, list[ChunkKey]] = defaultdict(list)
        """Of each request, what it loaded and stored so far: stores evict a chunk before those
        that it follows."""
        self._loaders = DaemonPool("lmcache-vllm-load", LOADERS)
        self._storer = DaemonPool("lmcache-vllm-store", 1)
        self._rows: _Offloaded | None = None
        try:
            self._loaders.start()
            self._storer.start()
            settings = _settings(config, strict)
            self._rows = _Offloaded(offloading_spec, primary_kv_view, settings)
        except Exception as error:
            self._loaders.close()
            self._storer.close()
            go_on_without("vLLM", error, strict=strict, logger=log)
            return
        self._lookups = _Lookups(tier_type, self._rows)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if self._rows is None or self._rows.use(moves=False) is None:
            return LookupResult.MISS
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, self._loaders, Rows.load)

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, self._storer, Rows.store)

    def _submit(self, job: TransferJob, workers: DaemonPool, move: _Move) -> None:
        rows = self._rows.use() if self._rows else None
        if rows is None:
            self._jobs[job.job_id] = job, _nothing()
            return
        chain = self._chains[job.req_context.req_id]
        first = len(chain)
        chain += rows.keys(list(job.keys))
        work = partial(_timed, move, rows, tuple(chain), first, job.chunk_ids.tolist())
        self._jobs[job.job_id] = job, workers.submit(work)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        done = [number for number, (_, future) in self._jobs.items() if future.done()]
        return [self._result(*self._jobs.pop(number)) for number in done]

    def _result(self, job: TransferJob, future: Future[_Outcome]) -> JobResult:
        keys = list(job.keys)
        count, seconds = future.result()
        if job.is_promotion and self._rows is not None:
            self._lookups.mark_miss(keys[count:])  # or vLLM would try again and again
        return JobResult(
            job.job_id,
            success=count == len(keys),
            successful_keys=keys[:count] or None,
            transfer_time=seconds,
            transfer_bytes=count * self.block_size_bytes,
        )

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._chains.pop(req_context.req_id, None)
        if self._rows is not None:
            self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        if self._rows is not None:
            self._lookups.flush()

    def drain_jobs(self) -> None:
        """VLLM resets its caches, as it does when weights change: wait for all jobs, then see what
        its workers compute with."""
        wait([future for _, future in self._jobs.values()])
        self._chains.clear()
        if self._rows is not None:
            self._rows.reset()

    def shutdown(self) -> None:
        rows, self._rows = self._rows, None
        if rows is None:
            return
        self._lookups.shutdown()
        wait([future for _, future in self._jobs.values()])
        self._loaders.close()
        self._storer.close()
        rows.close()


class _Offloaded:
    """vLLM's rows of host memory under what its workers compute with. `use` is for the thread that
    schedules, `contains` for any.

    When weights change, vLLM's own memory still has blocks of the old ones, and hands them on.
    Until it is reset nothing is stored or found, unless it held nothing.
    """

    def __init__(self, spec: OffloadingSpec, view: memoryview, config: Config) -> None:
        """Raises ConfigError."""
        self._workers = Workers()
        self._weights = self._workers.weights()
        if not self._weights:
            raise ConfigError("nobody can tell what vLLM computes with")
        self._empty = True
        """Whether vLLM has offloaded nothing since it was reset."""
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None:
            raise ConfigError(
                "vLLM did not load the plugin lmcache_core; does VLLM_PLUGINS name it?"
            )
        rows = torch.from_numpy(np.asarray(view)).view(torch.uint8)
        fields = offloaded(vllm_config, spec.config)
        self._cache = lmcache_core.open(config)
        try:
            named = {**fields, "weights": Weights(digest=self._weights)}
            self._rows = Rows(rows, self._cache, named)
        except Exception:
            self._cache.close()
            raise

    def use(self, moves: bool = True) -> Rows | None:
        """The rows, to find some, or to move some; None for now."""
        weights = self._workers.weights()
        if weights and weights != self._weights and self._empty:
            self._weights = weights
            self._rows.rename(weights=Weights(digest=weights))
        self._empty = self._empty and not moves
        return self._rows if weights == self._weights else None

    def reset(self) -> None:
        """VLLM's memory is empty: see what its workers compute with."""
        self._workers.forget()
        self._empty = True

    def contains(self, keys: Sequence[OffloadKey]) -> list[bool]:
        """Which of vLLM's keys are stored."""
        return self._rows.contains(self._rows.keys(keys))

    def close(self) -> None:
        """Write what was promised and release vLLM's memory."""
        self._cache.close()
        self._rows.close()


class _Lookups(AsyncLookupManager):
    """vLLM's background lookups, one batch for each request of a step."""

    def __init__(self, tier_type: str, rows: _Offloaded) -> None:
        self._rows = rows
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        return self._rows.contains(keys)


_Move = Callable[[Rows, tuple[ChunkKey, ...], int, Sequence[int]], int]


def _timed(
    move: _Move, rows: Rows, keys: tuple[ChunkKey, ...], first: int, ids: Sequence[int]
) -> _Outcome:
    began = time.monotonic()
    try:
        count = move(rows, keys, first, ids)
    except Exception as error:  # vLLM computes what did not come
        LOG.warn("vLLM tier", f"vLLM's tier: a job failed: {error!r}")
        count = 0
    return count, time.monotonic() - began


def _nothing() -> Future[_Outcome]:
    """What comes of a job without a cache."""
    future: Future[_Outcome] = Future()
    future.set_result((0, 0.0))
    return future


def _settings(entry: dict[str, Any], strict: bool) -> Config:
    """What a tier's entry describes, for chunks of one token."""
    config = read_config({"strict": strict, **entry}, "secondary_tiers")
    for tier in config.tiers:
        for serde in tier.serde:
            if isinstance(serde.create(), TensorsToTensors):
                raise ConfigError(f"{tier.where}.serde: {serde.name} wants numbers, rows are bytes")
    return config.model_copy(update={"chunk_size": 1})
