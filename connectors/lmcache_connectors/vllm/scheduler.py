"""The scheduler's side: looks prefixes up and decides what is loaded and stored.

All of it runs on the thread that schedules, where nothing may wait: lookups run on threads of
their own, and a request whose answer is not there yet is asked about again in the next step.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from lmcache_connectors.vllm import cache
from lmcache_connectors.vllm.chunks import Adapter, Chunks
from lmcache_connectors.vllm.lookup import Found, Lookup
from lmcache_connectors.vllm.messages import Metadata, Report
from lmcache_connectors.vllm.own_cache import OwnCache
from lmcache_connectors.vllm.weights import Workers
from lmcache_core import TierInfo
from lmcache_core.connector import LOG, DaemonPool, Steps, chunk_ends

log = logging.getLogger("vllm.lmcache_core")

INLINE_SECONDS = 0.002
"""How long the scheduler waits for lookups in a step before it goes on with other requests."""
LOOKUPS = 8
"""Lookups under way at once."""
ANNOUNCED_SECONDS = 2.0
"""How long a request waits for KV that another instance has announced."""
AGAIN_SECONDS = 0.01
"""How long after a look for it another one is worth it."""


@dataclass
class _Known:
    """What is remembered of a request."""

    request: Request
    reads: bool
    """Whether it may load. A load that failed is not tried again."""
    salt: str
    adapter: Adapter | None
    lookup: Future[Found] | None = None
    asked: tuple[int, int] = (0, 0)
    """Hashed and usable tokens that the lookup was about."""
    found: Found | None = None
    again: float = 0.0
    """When to look again for what another instance has announced."""
    until: float = 0.0
    """Until when to wait for it; 0 before anything was missing."""
    handled: int | None = None
    """Tokens whose blocks are stored, or were found stored; None before the first step."""
    loading: frozenset[int] = frozenset()
    """Blocks that were to be loaded last."""
    sources: list[tuple[TierInfo, int]] = field(default_factory=list)
    """Tokens that are loaded, by tier."""


class Scheduler:
    """One in each engine core."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig) -> None:
        """Raises ConfigError for what cannot be stored, RuntimeError where no thread can be had."""
        self._transfer = config.kv_transfer_config
        self._cache = cache.acquire(config, kv)
        try:
            self._shape = self._cache.shape(config, kv)
            self._world = config.parallel_config.tensor_parallel_size
            self._workers = Workers()
            self._use(self._workers.weights())
            self._lookups = DaemonPool("lmcache-vllm-lookup", LOOKUPS)
            self._lookups.start()
        except BaseException:
            cache.release(self._cache)
            raise
        self._chunk, self._hashed = self._shape.chunk, self._shape.hashed
        self._unit = self._shape.unit
        self._blocks = [part.block for part in self._shape.parts]
        self._first = self._weights
        """What `share_as` stands for."""
        self._patience = INLINE_SECONDS
        """What is left of it in this step."""
        self._requests: dict[str, _Known] = {}
        self._promised: dict[str, int] = {}
        """Up to which token requests are to be loaded, until vLLM has made room; it may do so in a
        later step, or never."""
        self._loads: list[Chunks] = []
        self._own_cache = OwnCache()
        self._adapters: dict[str, str] = {}
        """What each name stood for last: vLLM's own cache knows adapters by it."""
        self._step = 0
        self._steps = Steps(self._cache.engine.load_gate)
        events = config.kv_events_config
        self._events: list[KVCacheEvent] | None = (
            [] if events is not None and events.enable_kv_cache_events else None
        )
        tiers = ", ".join(tier.name for tier in self._cache.engine.tiers)
        log.info(
            "lmcache-core is on: %s; chunks of %d tokens, %.1f MB each",
            tiers, self._chunk, self._shape.bytes_per_chunk / 1e6,
        )  # fmt: skip

    def bind(self, blocks: KVCacheManager) -> None:
        """VLLM tells where it manages its blocks."""
        self._own_cache.blocks = blocks

    # What the workers compute with

    def _use(self, weights: str) -> None:
        """Look up and store what belongs to these. Raises ConfigError."""
        ranks = [self._shape.groups(n, weights) for n in range(self._world)] if weights else []
        self._weights, self._ranks = weights, ranks
        self._lookup = Lookup(
            ranks,
            self._cache.engine.locate,
            chunk=self._shape.chunk,
            hashed=self._shape.hashed,
            unit=self._shape.unit,
        )

    def _look(self) -> bool:
        """See what the workers compute with now. Returns whether that is known."""
        weights = self._workers.weights()
        if weights != self._weights:
            self._changed()
            try:
                self._use(weights)
            except Exception as error:  # a plugin's, which has a say in namespaces
                LOG.warn("vLLM weights", f"lmcache-core rests: {error!r}")
                self._weights = weights
                self._ranks = []
        return bool(self._ranks)

    def _changed(self) -> None:
        """What runs was computed with other weights, or another adapter, than it will be."""
        self._requests.clear()
        self._own_cache.outdate()
        if self._events is not None:
            self._events.append(AllBlocksCleared())

    # Looking up

    def begin(self, request: Request) -> None:
        """A request arrived: look its prefix up while it waits for its turn."""
        self._own_cache.begin(request.request_id)
        if not self._look() or not self._shape.knows(request):
            return
        lora = request.lora_request
        adapter = self._workers.adapter(lora) if lora else None
        if lora and adapter is None:
            return
        if adapter and self._adapters.setdefault(lora.lora_name, adapter.digest) != adapter.digest:
            self._adapters[lora.lora_name] = adapter.digest
            self._changed()
        reads = self._transfer.is_kv_consumer and not request.skip_reading_prefix_cache
        shared = self._shape.share_as and self._weights == self._first
        salt = "" if shared or not self._shape.share_as else self._weights
        known = _Known(request, reads, (adapter.digest if adapter else "") + salt, adapter)
        self._requests[request.request_id] = known
        if reads:
            self._ask(known)

    def _ask(self, known: _Known) -> Future[Found]:
        """The lookup of all that is hashed by now; one for each state of the request."""
        request = known.request
        usable = (request.num_tokens - 1) // self._unit * self._unit
        asked = (self._shape.hashed_tokens(request), usable)
        if known.lookup is None or known.asked != asked:
            known.asked = asked
            hashes = list(self._shape.hashes(request))
            known.lookup = self._lookups.submit(
                partial(self._lookup.find, hashes, usable, known.salt)
            )
        return known.lookup

    def match(self, request: Request, computed: int) -> int | None:
        """Tokens beyond `computed` that can be loaded; None while that is being found out."""
        self._look()
        self._promised.pop(request.request_id, None)
        known = self._requests.get(request.request_id)
        if known is not None and computed and self._own_cache.outdated:
            del self._requests[request.request_id]  # what it goes on from is not to be stored
            return 0
        if known is None or not known.reads:
            return 0
        lookup = self._ask(known)
        began = time.monotonic()
        try:
            found = lookup.result(max(0.0, self._patience))
        except FutureTimeout:
            return None
        except Exception as error:  # ours or a backend's; the request is computed
            LOG.warn("vLLM lookup", f"vLLM: a lookup failed: {error!r}")
            known.reads = False
            return 0
        finally:
            self._patience -= time.monotonic() - began
        if self._awaits(known, found):
            return None
        known.found = found
        end = min(found.tokens, found.usable)
        if end <= computed:
            return 0
        self._promised[request.request_id] = end
        return end - computed

    def _awaits(self, known: _Known, found: Found) -> bool:
        """Whether another instance has announced more, and may still be storing it. No thread
        waits for that: it is looked for again."""
        announced = min(_announced(known.request) // self._unit * self._unit, found.usable)
        now = time.monotonic()
        known.until = known.until or now + ANNOUNCED_SECONDS
        if found.tokens >= announced or now > known.until or self._alone():
            return False
        if now > known.again:
            known.lookup, known.again = None, now + AGAIN_SECONDS
        return True

    def _alone(self) -> bool:
        """Whether other hosts' KV cannot come for now: all stores beyond memory are bypassed."""
        engine = self._cache.engine
        stores = [n for n, tier in enumerate(engine.tiers) if not tier.in_memory]
        return bool(stores) and all(engine.bypassed(n) for n in stores)

    # Loading

    def allocated(self, request: Request, block_ids: tuple[list[int], ...], external: int) -> None:
        """VLLM has made room for `external` tokens, which follow what it has itself."""
        end = self._promised.pop(request.request_id)
        known = self._requests.get(request.request_id)
        if known is None or known.found is None:  # something changed since: vLLM computes them
            self._loads.append(self._nothing(request, end - external, end, block_ids))
            return
        found = known.found
        chunks = self._chunks(known, end - external, end, found.ends, block_ids)
        chunks.tiers = found.tiers
        first = chunks.first_block(0, self._blocks[0])
        known.loading = frozenset(chunks.block_ids[0][first:])
        known.sources = self._by_tier(found, end - external, end)
        for tier, tokens in known.sources:
            self._cache.count("hit_tokens", tokens, tier.name)
        self._loads.append(chunks)

    def _nothing(
        self, request: Request, begin: int, end: int, block_ids: tuple[list[int], ...]
    ) -> Chunks:
        """A load of which nothing will come."""
        ids = tuple(ids[: end // block] for ids, block in zip(block_ids, self._blocks, strict=True))
        return Chunks(request.request_id, "", [], [], begin, end, ids)

    def _by_tier(self, found: Found, begin: int, end: int) -> list[tuple[TierInfo, int]]:
        """Tokens of [begin, end) by the tier that has them."""
        tokens: Counter[int] = Counter()
        for place in range(bisect_right(found.ends, begin), len(found.ends)):
            start = (found.ends[place] - 1) // self._chunk * self._chunk
            part = min(found.ends[place], end) - max(start, begin)
            tokens[found.tiers[0][0][place]] += max(0, part)
        tiers = self._cache.engine.tiers
        return [(tiers[number], n) for number, n in tokens.items()]

    def sources(self, request: Request) -> list[tuple[TierInfo, int]]:
        """Tokens that are loaded for a request, by tier."""
        known = self._requests.get(request.request_id)
        return known.sources if known else []

    def _chunks(
        self,
        known: _Known,
        begin: int,
        end: int,
        ends: Sequence[int],
        block_ids: tuple[list[int], ...],
    ) -> Chunks:
        hashes = self._shape.hashes(known.request)
        return Chunks(
            request=known.request.request_id,
            salt=known.salt,
            ends=list(ends),
            hashes=[hashes[e // self._hashed - 1] for e in ends],
            begin=begin,
            end=end,
            block_ids=tuple(
                list(ids[: end // block])
                for ids, block in zip(block_ids, self._blocks, strict=True)
            ),
            adapter=known.adapter,
        )

    # Storing

    def step(self, output: SchedulerOutput) -> Metadata:
        """What the workers have to do in the step that `output` describes."""
        self._look()
        loads, self._loads = self._loads, []
        self._patience = INLINE_SECONDS
        stores: list[Chunks] = []
        if self._transfer.is_kv_producer and output.kv_connector_block_state is not None:
            for request, computed in _computed(output):
                known = self._requests.get(request)
                if known is not None:
                    stores += self._filled(known, computed, output)
        tokens = output.total_num_scheduled_tokens
        self._step += 1
        if tokens:
            prefill = 2 * max(output.num_scheduled_tokens.values()) >= tokens
            # Without stores, others are there to have prefills done elsewhere.
            counts = prefill and self._transfer.is_kv_producer
            self._steps.begin(self._step, tokens if counts else 0)
        return Metadata(loads, stores, self._weights, not tokens, self._step)

    def _filled(self, known: _Known, computed: int, output: SchedulerOutput) -> list[Chunks]:
        """The chunks that this step fills. A fault of ours must not end the engine."""
        try:
            return list(self._new_blocks(known, computed, output))
        except Exception as error:
            LOG.warn("vLLM step", f"vLLM: a request is not stored: {error!r}")
            self._requests.pop(known.request.request_id, None)
            return []

    def _new_blocks(
        self, known: _Known, computed: int, output: SchedulerOutput
    ) -> Iterator[Chunks]:
        """The chunks that this step fills, and the short one at its end. Where vLLM had more of
        the prefix itself than is stored, another one ends there: it is where prompts part."""
        name = known.request.request_id
        if known.handled is None or computed < known.handled:  # first, or begun anew
            stored = known.found.tokens if known.found else 0 if known.reads else computed
            known.handled = min(computed, stored) // self._unit * self._unit
        full = computed + output.num_scheduled_tokens[name]
        full = min(full, self._shape.hashed_tokens(known.request)) // self._unit * self._unit
        if full <= known.handled:
            return
        ends = set(chunk_ends(0, full, self._chunk))
        parted = min(computed, full) // self._unit * self._unit  # drafts may run ahead of full
        if parted > known.handled:
            ends.add(parted)
        ids = output.kv_connector_block_state.get_block_ids(name)
        yield self._chunks(known, known.handled, full, sorted(ends), ids)
        self._announce(known, known.handled, full)
        known.handled = full

    # What came of it

    def output(self, output: KVConnectorOutput) -> None:
        """What the workers report of a step."""
        report = output.kv_connector_worker_meta
        if isinstance(report, Report):
            self._steps.end(report.step)
            for load in report.loads:
                self._cache.engine.load_gate.record_load(*load)
            if report.adapters:
                self._workers.forget_adapters(report.adapters)
                self._changed()
        failed = frozenset(output.invalid_block_ids or ())
        for known in self._requests.values() if failed or output.failed_recving else ():
            name = known.request.request_id
            if name in output.failed_recving or known.loading & failed:
                known.reads = False

    def end(self, request: Request) -> dict[str, Any] | None:
        """The request is done or aborted. Returns what a proxy shall tell a decode instance."""
        self._own_cache.end(request.request_id)
        self._promised.pop(request.request_id, None)
        known = self._requests.pop(request.request_id, None)
        if known is None or known.handled is None or self._transfer.is_kv_consumer:
            return None
        return {ANNOUNCED: known.handled}

    def reset(self) -> bool:
        """VLLM has emptied its own cache, as those do who write to weights past it: see what they
        are now. What is stored belongs to what it was computed with."""
        self._workers.forget()
        self._own_cache.reset()
        return True

    def _announce(self, known: _Known, begin: int, end: int) -> None:
        """A KV event for routers: these blocks are stored outside of vLLM's memory."""
        if self._events is None:
            return
        request = known.request
        size = self._shape.vllm_hashed
        hashes = request.block_hashes[: end // size]
        first = begin // size
        in_memory = self._cache.engine.tiers[0].in_memory
        self._events.append(
            BlockStored(
                block_hashes=list(hashes[first:]),
                parent_block_hash=hashes[first - 1] if first else None,
                token_ids=list(request.all_token_ids[first * size : end]),
                block_size=size,
                lora_id=request.lora_request.adapter_id if request.lora_request else None,
                medium="CPU" if in_memory else "STORAGE",
                lora_name=request.lora_request.name if request.lora_request else None,
            )
        )

    def events(self) -> list[KVCacheEvent]:
        """KV events since the last call."""
        events, self._events = self._events or [], None if self._events is None else []
        return events

    def news(self) -> dict[str, float]:
        """What was counted since the last call."""
        return self._cache.news()

    def close(self) -> None:
        """Release threads and tiers."""
        self._lookups.close()
        cache.release(self._cache)


ANNOUNCED = "lmcache_core_tokens"
"""In kv_transfer_params: tokens that a prefill instance has stored, or is about to."""


def _announced(request: Request) -> int:
    value = (request.kv_transfer_params or {}).get(ANNOUNCED, 0)
    return value if isinstance(value, int) else 0


def _computed(output: SchedulerOutput) -> Iterator[tuple[str, int]]:
    """(request, tokens computed before this step) of all that are scheduled."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)
