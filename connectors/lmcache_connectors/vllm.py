"""vLLM: blocks that prefill computed come back for every later request, in any process.

vLLM builds the connector twice. The scheduler's side looks up, by vLLM's own block hashes, how far
a request's prefix is stored, and says which blocks to load and to store; the worker's side (one a
rank) moves whole blocks between vLLM's memory and the cache. A chunk is one vLLM block of one KV
cache group.

Nothing here may hurt the engine: what cannot be loaded is reported and recomputed, what cannot be
stored is dropped.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

import lmcache_core
from lmcache_connectors._vllm_identity import adapter, hash_block_size, namespaces
from lmcache_connectors._vllm_memory import GroupMemory
from lmcache_core import CacheEngine, ChunkKey, ConfigError, Namespace, Tensors, Workers

log = logging.getLogger("lmcache_core.vllm")

INLINE_SECONDS = 0.002
"""How long the scheduler waits for a lookup before it goes on with other requests."""
THREADS = 8


@dataclass
class Blocks:
    """Blocks [begin, end) tokens of one request, to be loaded or stored."""

    request: str
    hashes: list[bytes]
    """vLLM's hashes of the whole prefix, up to `end`."""
    salt: str
    """What else the blocks depend on: a LoRA's files, and how often weights were changed."""
    begin: int
    end: int
    sizes: list[int]
    """Tokens of a block, for each group."""
    block_ids: tuple[list[int], ...]
    """For each group, from the request's first block on; 0 where vLLM keeps none."""

    def first(self, group: int) -> int:
        """The first block to move: behind those that a sliding window has left."""
        ids = self.block_ids[group]
        first = self.begin // self.sizes[group]
        while first < len(ids) and ids[first] == 0:
            first += 1
        return first

    def wanted(self, group: int) -> list[int]:
        """The blocks to move."""
        return self.block_ids[group][self.first(group) :]


@dataclass
class Metadata(KVConnectorMetadata):
    """What the scheduler tells the workers in one step."""

    loads: list[Blocks] = field(default_factory=list)
    stores: list[Blocks] = field(default_factory=list)


class LmcacheCoreConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's KV connector over a CacheEngine.

    kv_connector_extra_config: `config_file`, or the keys of one (`tiers`); without either the
    environment says. `strict`: what makes reuse impossible is an error at start, not a log line.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: _Scheduler | None = None
        self._worker: _Worker | None = None
        self._failed: set[int] = set()
        try:
            if role is KVConnectorRole.SCHEDULER:
                self._scheduler = _Scheduler(vllm_config, kv_cache_config)
            else:
                self._worker = _Worker(vllm_config, kv_cache_config)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Serve without a cache, and say why; or stop, where the config says so."""
        if self._kv_transfer_config.get_from_extra_config("strict", False):
            raise error
        log.warning("lmcache-core is off, vLLM goes on without it: %s", error)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may forget: preempted requests owe nobody their blocks."""
        return False

    # The scheduler's side

    def on_new_request(self, request: Request) -> None:
        if self._scheduler:
            self._scheduler.begin(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if not self._scheduler:
            return 0, False
        return self._scheduler.match(request, num_computed_tokens), False

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        if self._scheduler and num_external_tokens:
            self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Metadata:
        return self._scheduler.step(scheduler_output) if self._scheduler else Metadata()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self._scheduler and connector_output.invalid_block_ids:
            self._scheduler.failed(connector_output.invalid_block_ids)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler:
            self._scheduler.end(request)
        return False, None

    def reset_cache(self) -> bool | None:
        """What was stored so far belongs to weights that may be others now."""
        return self._scheduler.reset() if self._scheduler else None

    # The worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if not self._worker:
            return
        try:
            self._worker.use(kv_caches)
        except Exception as error:
            self._worker.close()
            self._worker = None
            self._give_up(error)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for blocks in self._step.loads:
            came = self._worker.load(blocks) if self._worker else [0] * len(blocks.sizes)
            for group, count in enumerate(came):
                self._failed.update(blocks.wanted(group)[count:])

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Blocks are whole before the first layer runs."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Blocks are stored whole, after the last layer."""

    def wait_for_save(self) -> None:
        for blocks in self._step.stores if self._worker else ():
            self._worker.store(blocks)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

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


@dataclass
class _Known:
    """What the scheduler's side remembers of a request."""

    request: Request
    salt: str
    lookup: Future[int] | None = None
    """Tokens of the prefix that are stored."""
    asked: int = 0
    """Hashes that the lookup was about."""
    found: int = 0
    handled: int | None = None
    """Tokens whose blocks are stored, or were found stored; None before the first step."""
    loading: tuple[list[int], ...] = ()
    """Blocks that were to be loaded last."""
    failed: bool = False
    """A load failed: compute, do not try again."""


class _Scheduler:
    """Looks up and decides. Runs on the scheduler's thread, where nothing may wait."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig) -> None:
        self._transfer = config.kv_transfer_config
        self._tokens = hash_block_size(config, kv)
        world = config.parallel_config.tensor_parallel_size
        self._ranks = [_groups(config, kv, rank) for rank in range(world)]
        self._sizes = [group.tokens for group in self._ranks[0]]
        self._unit = math.lcm(*self._sizes)
        self._cache = _shared_engine(config)
        self._lookups = Workers("lmcache-vllm-lookup", THREADS)
        self._requests: dict[str, _Known] = {}
        self._loads: list[Blocks] = []
        self._epoch = ""

    def begin(self, request: Request) -> None:
        """A request arrived: look its prefix up while it waits for its turn."""
        known = _Known(request, adapter(request.lora_request) + self._epoch)
        self._requests[request.request_id] = known
        if self._transfer.is_kv_consumer and not request.skip_reading_prefix_cache:
            self._ask(known)

    def _ask(self, known: _Known) -> Future[int]:
        """The lookup of all that is hashed by now; one for each state of the request."""
        hashes = list(known.request.block_hashes)
        if known.lookup is None or known.asked != len(hashes):
            known.asked = len(hashes)
            known.lookup = self._lookups.submit(lambda: self._find(hashes, known.salt))
        return known.lookup

    def _find(self, hashes: list[bytes], salt: str) -> int:
        """Tokens of the prefix that every group of every rank has."""
        found = len(hashes) * self._tokens
        for group in itertools.chain.from_iterable(self._ranks):
            keys = group.keys(hashes, salt)[: found // group.tokens]
            found = min(found, self._cache.lookup(keys).chunks * group.tokens if keys else 0)
        return found - found % self._unit

    def match(self, request: Request, computed: int) -> int | None:
        """Tokens beyond `computed` that can be loaded; None while that is being found out."""
        known = self._requests.get(request.request_id)
        if known is None or known.failed or known.lookup is None:
            return 0
        lookup = self._ask(known)
        try:
            known.found = lookup.result(INLINE_SECONDS)
        except FutureTimeout:
            return None
        except Exception as error:  # ours or a backend's; the request is computed
            log.warning("a lookup failed: %r", error)
            known.found = 0
        # vLLM must have at least one token to compute.
        usable = (request.num_tokens - 1) // self._unit * self._unit
        return max(0, min(known.found, usable) - computed)

    def allocated(self, request: Request, block_ids: tuple[list[int], ...], external: int) -> None:
        """VLLM has made room for `external` tokens, which follow what it has itself."""
        known = self._requests[request.request_id]
        usable = (request.num_tokens - 1) // self._unit * self._unit
        end = min(known.found, usable)
        blocks = self._blocks(known, end - external, end, block_ids)
        known.loading = tuple(blocks.wanted(group) for group in range(len(block_ids)))
        self._loads.append(blocks)

    def _blocks(
        self, known: _Known, begin: int, end: int, block_ids: tuple[list[int], ...]
    ) -> Blocks:
        return Blocks(
            request=known.request.request_id,
            hashes=list(known.request.block_hashes[: end // self._tokens]),
            salt=known.salt,
            begin=begin,
            end=end,
            sizes=self._sizes,
            block_ids=tuple(
                list(ids[: end // size]) for ids, size in zip(block_ids, self._sizes, strict=True)
            ),
        )

    def step(self, output: SchedulerOutput) -> Metadata:
        """What the workers have to do in the step that `output` describes."""
        loads, self._loads = self._loads, []
        stores: list[Blocks] = []
        if self._transfer.is_kv_producer and output.kv_connector_block_state is not None:
            for request, computed in _computed(output):
                known = self._requests.get(request)
                if known is not None:
                    stores += self._new_blocks(known, computed, output)
        return Metadata(loads, stores)

    def _new_blocks(
        self, known: _Known, computed: int, output: SchedulerOutput
    ) -> Iterator[Blocks]:
        """The blocks that this step fills."""
        name = known.request.request_id
        if known.handled is None or computed < known.handled:  # first, or begun anew
            known.handled = min(computed, known.found) if known.lookup else computed
            known.handled -= known.handled % self._unit
        full = min(
            computed + output.num_scheduled_tokens[name],
            len(known.request.block_hashes) * self._tokens,
        )
        full -= full % self._unit
        if full > known.handled:
            ids = output.kv_connector_block_state.get_block_ids(name)
            yield self._blocks(known, known.handled, full, ids)
            known.handled = full

    def failed(self, blocks: set[int]) -> None:
        """Blocks that could not be loaded: their requests are computed now."""
        for known in self._requests.values():
            known.failed |= any(not blocks.isdisjoint(ids) for ids in known.loading)

    def end(self, request: Request) -> None:
        """The request is done or aborted."""
        self._requests.pop(request.request_id, None)

    def reset(self) -> bool:
        """From now on share nothing with what was stored so far."""
        self._epoch = f" {uuid.uuid4()}"
        return True

    def close(self) -> None:
        """Release threads and tiers."""
        self._lookups.close()
        _ENGINES.release(self._cache)


class _Worker:
    """Moves blocks between vLLM's memory and the cache, on the worker's thread."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig) -> None:
        self._config, self._kv = config, kv
        self._groups: list[_Group] = []
        self._memory: list[GroupMemory] = []
        self._cache = _shared_engine(config)

    def use(self, layers: Mapping[str, torch.Tensor]) -> None:
        """Move blocks of these from now on. Raises ConfigError where they are not understood."""
        self._groups = _groups(self._config, self._kv, get_tensor_model_parallel_rank())
        for spec, group in zip(self._kv.kv_cache_groups, self._groups, strict=True):
            layout = group.namespace.layout.groups[0]
            memory = GroupMemory([layers[name] for name in spec.layer_names], layout, group.tokens)
            memory.prove()
            self._memory.append(memory)

    def load(self, blocks: Blocks) -> list[int]:
        """Load `blocks`; returns for each group how many of those that are wanted came."""
        return [self._load(number, blocks) for number in range(len(self._groups))]

    def _load(self, number: int, blocks: Blocks) -> int:
        group, memory, ids = self._groups[number], self._memory[number], blocks.block_ids[number]
        first = blocks.first(number)
        count = 0
        try:
            keys = group.keys(blocks.hashes, blocks.salt)
            for chunk in self._cache.load(keys, start=first):
                memory.scatter(ids[chunk.index], chunk.tensors)
                count += 1
        except Exception as error:  # vLLM computes what did not come
            log.warning("a load failed: %r", error)
        return count

    def store(self, blocks: Blocks) -> None:
        """Store `blocks`. What cannot be stored is dropped and counted by the cache."""
        for number, (group, memory) in enumerate(zip(self._groups, self._memory, strict=True)):
            ids = blocks.block_ids[number]

            def gather(index: int, out: Tensors) -> None:
                memory.gather(ids[index], out)  # noqa: B023

            try:
                self._cache.store(
                    group.salted(blocks.salt),
                    group.keys(blocks.hashes, blocks.salt),
                    gather,
                    start=blocks.first(number),
                    tokens=group.tokens,
                )
            except Exception as error:  # a block that is not stored is computed again one day
                log.warning("a store failed: %r", error)

    def close(self) -> None:
        """Write what was promised and release the tiers."""
        _ENGINES.release(self._cache)


def _computed(output: SchedulerOutput) -> Iterator[tuple[str, int]]:
    """(request, tokens computed before this step) of all that are scheduled."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)


class _Group(NamedTuple):
    """A KV cache group of one worker."""

    namespace: Namespace
    tokens: int
    """Of a block."""
    step: int
    """Hashes in a block."""

    def salted(self, salt: str) -> Namespace:
        """The namespace of blocks that depend on `salt`, too."""
        return self.namespace.model_copy(update={"adapter": salt}) if salt else self.namespace

    def keys(self, hashes: Sequence[bytes], salt: str) -> list[ChunkKey]:
        """Of the whole blocks that `hashes` stand for."""
        return self.salted(salt).keys_from_hashes(hashes[self.step - 1 :: self.step])


def _groups(config: VllmConfig, kv: KVCacheConfig, rank: int) -> list[_Group]:
    """The groups of worker `rank`. Raises ConfigError for what cannot be stored."""
    hashed = hash_block_size(config, kv)
    sizes = [group.kv_cache_spec.block_size for group in kv.kv_cache_groups]
    if len(sizes) > 1:  # vLLM takes no reports of failed blocks for these
        raise ConfigError("models with several KV cache groups are not supported yet")
    if any(size % hashed for size in sizes):
        raise ConfigError(f"blocks of {sizes} tokens, but hashes of {hashed}")
    return [
        _Group(namespace, size, size // hashed)
        for namespace, size in zip(namespaces(config, kv, rank), sizes, strict=True)
    ]


class _Engines:
    """One CacheEngine for each config in this process: both sides may be in it."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[CacheEngine, int]] = {}
        self._lock = threading.Lock()

    def acquire(self, source: Any) -> CacheEngine:
        name = json.dumps(source, sort_keys=True, default=str)
        with self._lock:
            engine, users = self._open.get(name) or (lmcache_core.open(source), 0)
            self._open[name] = engine, users + 1
        return engine

    def release(self, engine: CacheEngine) -> None:
        with self._lock:
            for name, (each, users) in list(self._open.items()):
                if each is not engine:
                    continue
                if users > 1:
                    self._open[name] = each, users - 1
                    return
                del self._open[name]
        engine.close()


_ENGINES = _Engines()


def _shared_engine(config: VllmConfig) -> CacheEngine:
    """The engine that extra_config or the environment describes."""
    extra = dict(config.kv_transfer_config.kv_connector_extra_config)
    extra.pop("strict", None)
    file = extra.pop("config_file", None)
    if file and extra:
        raise ConfigError("kv_connector_extra_config: expected either config_file or its keys")
    return _ENGINES.acquire(file or extra or None)
