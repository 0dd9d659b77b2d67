"""vLLM's native offloading without a GPU: its spec with copies on the CPU, and its manager alone."""

from __future__ import annotations

import contextlib
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LookupResult,
    OffloadingWorker,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    TransferResult,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from lmcache_connectors.vllm import weights as observed
from lmcache_connectors.vllm.tier import LmcacheCoreTier
from lmcache_connectors.vllm.weights import weights_of
from tests.e2e.vllm.conftest import BLOCK

PATIENCE = 20.0
PAGE = 5000
"""Bytes of a block, of all workers, in the manager's tests; vLLM rounds rows up to 8192."""


class CpuTieringSpec(TieringOffloadingSpec):
    """vLLM's tiers, for KV memory that lies on the host."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=0,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return _Copies(kv_caches, region)


class _Copies(OffloadingWorker):
    """One block a chunk, copied at once."""

    def __init__(self, caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        self._pairs = [
            (each.tensor, region.create_next_worker_view(each.page_size_bytes))
            for each in caches.tensors
        ]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src: GPULoadStoreSpec, dst: CPULoadStoreSpec) -> bool:
        for blocks, rows in self._pairs:
            rows[dst.chunk_ids.tolist()] = blocks[src.block_ids.tolist()]
        return self._finished(job_id)

    def submit_load(self, job_id: int, src: CPULoadStoreSpec, dst: GPULoadStoreSpec) -> bool:
        for blocks, rows in self._pairs:
            blocks[dst.block_ids.tolist()] = rows[src.chunk_ids.tolist()]
        return self._finished(job_id)

    def _finished(self, job_id: int) -> bool:
        self._done.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._pairs.clear()
        self._region.cleanup()


def extra_config(tier: dict[str, Any], rows: int = 512) -> dict[str, Any]:
    """kv_connector_extra_config with room for `rows` blocks of the tiny models on the CPU."""
    return {
        "spec_name": "CpuTieringSpec",
        "spec_module_path": __name__,
        "cpu_bytes_to_use": rows << 16,
        "secondary_tiers": [{"type": "LmcacheCoreTier", **tier}],
    }


def transfer(tier: dict[str, Any], rows: int = 512) -> dict[str, Any]:
    """kv_transfer_config of an engine with vLLM's offloading and our tier."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra_config(tier, rows),
    }


def vllm_config(model: Path, **options: Any) -> VllmConfig:
    """What vLLM makes of a model's directory."""
    settings = {"skip_tokenizer_init": True, "dtype": "float32", "block_size": BLOCK}
    return EngineArgs(model=str(model), **{**settings, **options}).create_engine_config()


class Core:
    """As much of vLLM's engine core as we ask, with a worker that holds `weights`."""

    lmcache_core = 0

    def __init__(self, config: VllmConfig) -> None:
        self.vllm_config, self.model_executor = config, self
        self.is_sleeping, self.weights = False, b"some"

    def collective_rpc(self, question: Any, args: tuple[Any, ...]) -> list[Any]:
        assert question is weights_of
        return [({"w": self.weights}, 4)]


class Offloading:
    """vLLM's tiering manager with our tier, and what its scheduler does with it."""

    def __init__(
        self, config: VllmConfig, tier: dict[str, Any], rows: int = 8, weights: bytes = b"some"
    ) -> None:
        self.core = Core(config)
        self.core.weights = weights
        observed._core = weakref.ref(self.core)
        self.spec = TieringOffloadingSpec(_offloading(config, tier, rows))
        with set_current_vllm_config(config):
            self.manager = self.spec.get_manager()
        self.tier: LmcacheCoreTier = self.manager.secondary_tiers[0]
        self._requests = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[ReqContext]:
        self._requests += 1
        context = ReqContext(f"request-{self._requests}")
        self.manager.on_new_request(context)
        yield context
        self.manager.on_request_finished(context)
        self.step()

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def store(self, content: dict[OffloadKey, np.ndarray]) -> None:
        """Offload blocks, and let them reach our tier."""
        with self.request() as context:
            prepared = self.manager.prepare_store(list(content), context)
            assert prepared is not None
            for key, row in zip(prepared.keys_to_store, prepared.store_spec.chunk_ids, strict=True):
                self._rows()[row, :] = content[key]
            self.manager.complete_store(prepared.keys_to_store, context)
        self.until_idle()

    def until_idle(self) -> None:
        end = time.monotonic() + PATIENCE
        while self.manager.has_pending_work():
            assert time.monotonic() < end
            self.step()

    def find(self, keys: Sequence[OffloadKey]) -> dict[OffloadKey, np.ndarray]:
        """What vLLM finds of the prefix `keys`, asking again as its scheduler does."""
        end = time.monotonic() + PATIENCE
        with self.request() as context:
            while True:
                results = []
                for key in keys:
                    results.append(self.manager.lookup(key, context))
                    if results[-1] is LookupResult.MISS:
                        break
                if not {LookupResult.RETRY, LookupResult.HIT_PENDING} & set(results):
                    break
                assert time.monotonic() < end
                self.step()
            found = keys[: results.count(LookupResult.HIT)]
            if not found:
                return {}
            rows = self.manager.prepare_load(found, context).chunk_ids
            content = {k: self._rows()[row].copy() for k, row in zip(found, rows, strict=True)}
            self.manager.complete_load(found, context)
            return content

    def forget(self) -> None:
        """Offload so much else that vLLM's own rows hold nothing of what was."""
        for _ in range(self.spec.num_chunks):
            self.store(content(1, self.width))

    def reset(self) -> None:
        """As vLLM does when weights change, with nothing on its way."""
        self.core.lmcache_core += 1
        self.manager.reset_cache()
        if hasattr(self.manager, "on_reset_flushed"):  # since vLLM 0.33
            self.manager.on_reset_flushed()

    @property
    def width(self) -> int:
        return self.spec.kv_bytes_per_chunk

    def _rows(self) -> np.ndarray:
        return np.asarray(self.manager.primary_tier.get_kv_memoryview()).view(np.uint8)

    def close(self) -> None:
        self.manager.shutdown()


def content(count: int, width: int) -> dict[OffloadKey, np.ndarray]:
    """Blocks of random bytes under keys of their own."""
    random = np.random.default_rng(uuid.uuid4().int)
    return {
        make_offload_key(random.bytes(32), 0): random.integers(0, 256, width, np.uint8)
        for _ in range(count)
    }


def same(some: dict[OffloadKey, np.ndarray], others: dict[OffloadKey, np.ndarray]) -> bool:
    return some.keys() == others.keys() and all(np.array_equal(some[k], others[k]) for k in some)


def _offloading(config: VllmConfig, tier: dict[str, Any], rows: int) -> OffloadingConfig:
    workers, tokens = config.parallel_config.world_size, config.cache_config.block_size
    parallel = OffloadingParallelConfig(
        rank=0, world_size=workers, tp_size=workers, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0,
        data_parallel_size=1, data_parallel_rank_local=None, is_parallelism_agnostic=True,
    )  # fmt: skip
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(tokens, ("model.layers.0", "model.layers.1"), 0),),
        worker_kv_bytes_per_block=PAGE // workers,
        enable_kv_cache_events=False,
        extra_config=extra_config(tier) | {"cpu_bytes_to_use": rows * 8192},
        engine_id=str(uuid.uuid4()),
        model=OffloadingModelConfig(config.model_config.model, "float32"),
        cache=OffloadingCacheConfig(tokens, 1),
        parallel=parallel,
    )
