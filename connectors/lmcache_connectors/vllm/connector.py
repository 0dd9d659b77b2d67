"""vLLM: blocks that prefill computed come back for every later request, in any process.

vLLM builds the connector twice. The scheduler's side (`scheduler.py`) looks up, by vLLM's
own block hashes, how far a request's prefix is stored, and says what to load and to store; the
worker's side (`worker.py`, one a rank) moves whole blocks between vLLM's memory and the
cache. Whose KV it is says `identity.py`, and `memory.py` proves that blocks are where
they seem to be.

Nothing here may hurt the engine: what cannot be loaded is reported and recomputed, what cannot be
stored is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_events import KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from lmcache_connectors.vllm.cache import settings
from lmcache_connectors.vllm.messages import Metadata, Report
from lmcache_connectors.vllm.scheduler import Scheduler
from lmcache_connectors.vllm.stats import Metrics, Stats
from lmcache_connectors.vllm.worker import Worker
from lmcache_core.connector import go_on_without, is_strict

log = logging.getLogger("vllm.lmcache_core")


def _speak_through_vllm() -> None:
    """Let vLLM's handlers have what the core logs, unless somebody handles it already."""
    core, vllm = logging.getLogger("lmcache_core"), logging.getLogger("vllm")
    if not core.hasHandlers():
        core.handlers = list(vllm.handlers)


class LmcacheCoreConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's KV connector over a CacheEngine.

    kv_connector_extra_config: `config_file`, or the keys of one (`tiers`, `strict` ...); without
    either the environment says. Where reuse is impossible vLLM serves without a cache, and one
    line says why; with `strict` it does not start.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _speak_through_vllm()
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._refused: set[str] = set()
        """Requests that a worker without a cache was to load."""
        try:
            if role is KVConnectorRole.SCHEDULER:
                self._scheduler = Scheduler(vllm_config, kv_cache_config)
            else:
                self._worker = Worker(vllm_config, kv_cache_config)
        except Exception as error:  # vLLM must start
            self._give_up(error)
        if self._kv_transfer_config.kv_load_failure_policy != "recompute":
            log.warning(
                'lmcache-core: kv_load_failure_policy is set to "recompute": a cache may lose '
                "what it has, and no request shall fail for it"
            )
            self._kv_transfer_config.kv_load_failure_policy = "recompute"

    def _give_up(self, error: Exception) -> None:
        """Serve without a cache, and say why; or stop, where the config says so."""
        strict = is_strict(settings(self._vllm_config))
        go_on_without("vLLM", error, strict=strict, logger=log)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may forget: preempted requests owe nobody their blocks."""
        return False

    # The scheduler's side

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._scheduler:
            self._scheduler.bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        if self._scheduler:
            self._scheduler.begin(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        found = self._scheduler.match(request, num_computed_tokens)
        return found, bool(found)

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        if self._scheduler and num_external_tokens:
            self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Metadata:
        return self._scheduler.step(scheduler_output) if self._scheduler else Metadata()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        if self._scheduler and isinstance(report, Report) and report.off:
            self._scheduler.close()
            self._scheduler = None
        if self._scheduler:
            self._scheduler.output(connector_output)

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[Any, int]:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource  # not in vLLM 0.30

        tokens: dict[Any, int] = {}
        for tier, n in self._scheduler.sources(request) if self._scheduler else ():
            unknown = CacheHitSource.EXTERNAL_UNSPECIFIED
            disk = CacheHitSource.DISK if tier.medium == "disk" else unknown
            source = CacheHitSource.HOST if tier.in_memory else disk
            tokens[source] = tokens.get(source, 0) + n
        return tokens

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.end(request) if self._scheduler else None

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self._scheduler.events() if self._scheduler else ()

    def reset_cache(self) -> bool | None:
        """Weights may be others now."""
        return self._scheduler.reset() if self._scheduler else None

    # The worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if not self._worker:
            return
        try:
            self._worker.use(kv_caches)
        except Exception as error:  # vLLM must start
            self._worker.close()
            self._worker = None
            self._give_up(error)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker:
            self._worker.begin(self._step)
        else:
            self._refused.update(chunks.request for chunks in self._step.loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Blocks are whole before a request is computed."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Blocks are stored whole, after the last layer."""

    def wait_for_save(self) -> None:
        if self._worker:
            self._worker.store(self._step)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        refused, self._refused = self._refused, set()
        ended, failed = self._worker.results() if self._worker else (refused, refused)
        return KVConnectorTransferResults(finished_recving=ended, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.failed_blocks() if self._worker else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata:
        return self._worker.report(self._step.number) if self._worker else Report(off=True)

    # Both

    def get_kv_connector_stats(self) -> Stats | None:
        side = self._scheduler or self._worker
        return Stats(news) if side and (news := side.news()) else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(dict(data or {}))

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> Metrics:
        return Metrics(*arguments)

    def shutdown(self) -> None:
        for side in (self._scheduler, self._worker):
            if side:
                side.close()
        self._scheduler = self._worker = None

    @property
    def _step(self) -> Metadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Metadata)
        return metadata
