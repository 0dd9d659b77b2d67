"""The worker's side: moves blocks between vLLM's memory and the cache. One for each rank.

Loads run on threads of their own, while vLLM computes other requests: it uses a block only after
its load was reported. What did not come is reported, too, and vLLM computes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig

from lmcache_connectors.vllm import cache
from lmcache_connectors.vllm.chunks import Chunks, Group, all_or_nothing
from lmcache_connectors.vllm.messages import Metadata, Report
from lmcache_connectors.vllm.packing import Packing, layer_write, prove
from lmcache_connectors.vllm.weights import adapter_here
from lmcache_core import ConfigError, Hit, Tensors
from lmcache_core.connector import LOG, DaemonPool, PagedMemory, run_threads_on, side_stream, whole

LOADS = 8
"""Requests whose KV is loaded at once."""
IDLE_SECONDS = 0.05
"""How long a step that computes nothing waits for a load, rather than come back in vain."""
BINDINGS = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")
"""What vLLM sets, by the OpenMP library, for a worker that computes on the CPU."""
STAGED = 4
"""Steps whose new blocks may wait on the device for their way to the host; more are dropped."""


def spare_cores() -> set[int]:
    """Where our threads may run if vLLM has bound this process to the cores it computes on: all
    that its parent may use. None for where they are started."""
    bound = current_platform.is_cpu() and any(name in os.environ for name in BINDINGS)
    if not bound or not hasattr(os, "sched_getaffinity"):  # macOS binds no thread to a core
        return set()
    return os.sched_getaffinity(os.getppid())


class _Load(NamedTuple):
    """A load in the background."""

    end: Future[set[int]]
    """The blocks that did not come."""
    chunks: Chunks
    weights: str
    """What they belong to."""


class _Job(NamedTuple):
    """Blocks of one group that are to be stored."""

    chunks: Chunks
    ids: list[int]
    group: Group
    memory: PagedMemory


class Worker:
    """The side of one rank."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig) -> None:
        """Raises ConfigError for what cannot be stored, RuntimeError where no thread can be had."""
        self._config, self._kv = config, kv
        self._memory: list[PagedMemory] = []
        self._loads: dict[str, _Load] = {}
        self._failed_blocks: set[int] = set()
        self._whole = False
        """Whether a load is of use only if all of it comes."""
        self._ended: list[tuple[int, int, float]] = []
        """Loads of which the scheduler has not heard; see `Report`."""
        self._staged: list[Future[None]] = []
        self._weights = ""
        """What the scheduler knew of weights in the last step."""
        self._groups: list[Group] = []
        """Whose KV that is; none while nobody can tell."""
        self._others: set[int] = set()
        """Adapters that are not what the scheduler thought, of which it has not heard."""
        run_threads_on(spare_cores())
        self._cache = cache.acquire(config, kv)
        self._loaders = DaemonPool("lmcache-vllm-load", LOADS)
        self._storer = DaemonPool("lmcache-vllm-store", 1)
        try:
            self._loaders.start()
            self._storer.start()
        except BaseException:
            self.close()
            raise

    def use(self, layers: Mapping[str, torch.Tensor]) -> None:
        """Move blocks of these from now on. Raises ConfigError where they are not understood."""
        self._rank = get_tensor_model_parallel_rank()
        self._shape = self._cache.shape(self._config, self._kv)
        self._chunk = self._shape.chunk
        for part in self._shape.parts:
            layout = part.layout.groups[0]
            mine = [layers[name] for name in part.names]
            memory = PagedMemory(mine, layout, part.block, part.packing)
            memory.prove()
            if part.packing and layout.value_dim:
                self._prove_packing(part.packing, part.names[0], mine[0])
            self._memory.append(memory)
        self._whole = all_or_nothing([part.window for part in self._shape.parts])
        self._cache.engine.warm([part.layout for part in self._shape.parts])

    def _prove_packing(self, packing: Packing, name: str, memory: torch.Tensor) -> None:
        """See that the layer itself writes keys and values so. Raises ConfigError."""
        layer = self._config.compilation_config.static_forward_context[name]
        if not prove(packing, layer_write(layer), memory):
            raise ConfigError(f"vLLM does not pack keys and values as in {packing.name}")

    # Loading

    def begin(self, step: Metadata) -> None:
        """Start the step's loads."""
        if step.weights != self._weights:
            self._weights = step.weights
            self._groups = self._shape.groups(self._rank, step.weights) if step.weights else []
        for chunks in step.loads:
            groups = self._groups if chunks.ends and not self._other(chunks) else []
            work = partial(self._load, chunks, groups)
            load = _Load(self._loaders.submit(work), chunks, self._weights)
            self._loads[chunks.request] = load
        if step.idle and self._loads:
            ends = [load.end for load in self._loads.values()]
            wait(ends, IDLE_SECONDS, return_when="FIRST_COMPLETED")

    def _other(self, chunks: Chunks) -> bool:
        """Whether the chunks are of an adapter that is another one here, or gone."""
        adapter = chunks.adapter
        if adapter is None or adapter_here(adapter.number) == adapter.ranks[self._rank]:
            return False
        self._others.add(adapter.number)
        return True

    def _load(self, chunks: Chunks, groups: Sequence[Group]) -> set[int]:
        """Load what belongs to `groups`; with none, nothing. Returns the blocks that did not
        come."""
        began, pays = time.perf_counter(), self._cache.engine.load_gate
        begun = pays.begin()
        missing = [self._load_group(n, group, chunks) for n, group in enumerate(groups)]
        seconds = pays.end(begun)
        if self._rank == 0 and groups:  # one load, however many ranks; none that read nothing
            self._ended.append((self._slowest(chunks), self._came(chunks, missing), seconds))
        self._cache.count("loads", 1)
        self._cache.count("load_seconds", time.perf_counter() - began)
        if any(missing) or not groups:
            self._cache.count("failed_loads", 1)
        if not groups:
            return self._blocks(chunks)
        return {block for blocks in missing for block in blocks}

    def _blocks(self, chunks: Chunks) -> set[int]:
        """All that a load is to fill."""
        cut = [(n, part.block) for n, part in enumerate(self._shape.parts)]
        return {
            each
            for n, block in cut
            for each in chunks.block_ids[n][chunks.first_block(n, block) : chunks.end // block]
        }

    def _came(self, chunks: Chunks, missing: Sequence[Sequence[int]]) -> int:
        """Tokens that vLLM need not compute, where these blocks of each group did not come."""
        if self._whole and any(missing):
            return 0
        computed: int = len(missing[0]) * self._groups[0].block
        return chunks.end - chunks.begin - computed

    def _slowest(self, chunks: Chunks) -> int:
        """The number of the slowest tier that a load needs."""
        first = chunks.place(chunks.begin)
        slowest: int = max(tier for row in chunks.tiers[self._rank] for tier in row[first:])
        return slowest

    def _load_group(self, number: int, group: Group, chunks: Chunks) -> list[int]:
        """The blocks of a group that did not come."""
        memory, ids = self._memory[number], chunks.block_ids[number]
        done = first = chunks.first_block(number, group.block)
        last = chunks.end // group.block
        place = chunks.place(first * group.block)
        keys = group.keys(chunks.hashes, chunks.salt)
        hit = Hit(tuple(keys), tuple(chunks.tiers[self._rank][number]))
        try:
            with side_stream(memory.device):
                for chunk in self._cache.engine.load(hit, start=place, shared=True):
                    start = chunks.start(place, self._chunk) // group.block
                    end = min(chunks.ends[place] // group.block, last)
                    for block in range(max(first, start), end):
                        memory.scatter(ids[block], chunk.tensors, block - start)
                    place, done = place + 1, end
        except Exception as error:  # vLLM computes what did not come
            LOG.warn("vLLM load", f"vLLM: a load failed: {error!r}")
            return ids[first:last]
        return ids[done:last]

    def results(self) -> tuple[set[str], set[str]]:
        """Requests whose loads have ended, and those of them that must be computed anew."""
        ended = {name for name, load in self._loads.items() if load.end.done()}
        failed: set[str] = set()
        for name in ended:
            load = self._loads.pop(name)
            current = load.weights == self._weights  # else they were changed meanwhile
            missing = load.end.result() if current else self._blocks(load.chunks)
            if missing and self._whole:
                failed.add(name)
            elif missing:
                self._failed_blocks |= missing
        return ended, failed

    def failed_blocks(self) -> set[int]:
        """Blocks that did not come, of requests that `results` has named."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    # Storing

    def store(self, step: Metadata) -> None:
        """Store the blocks that a step has filled. What cannot be stored is dropped and counted."""
        jobs = [
            _Job(chunks, chunks.block_ids[n], group, self._memory[n])
            for chunks in step.stores
            if not self._other(chunks)
            for n, group in enumerate(self._groups)
        ]
        if not jobs:
            return
        if self._memory[0].device.type == "cpu":
            for job in jobs:
                self._store_group(job)
            return
        # Copied on the device, in the order of its work, so that vLLM may overwrite the blocks at
        # once; from there to the host while it computes on.
        self._staged = [job for job in self._staged if not job.done()]
        try:
            staged = len(self._staged) < STAGED and [self._stage(job) for job in jobs]
        except torch.OutOfMemoryError:  # vLLM's work comes first
            staged = False
        if staged:
            self._staged.append(self._storer.submit(partial(self._store_staged, staged)))
        else:
            self._cache.count("stores_skipped", len(step.stores))

    def _stage(self, job: _Job) -> _Job:
        """The blocks that are to be stored, copied on the device."""
        first = job.chunks.begin // self._chunk * self._chunk // job.group.block
        return job._replace(memory=job.memory.staged(job.ids[first:]))

    def _store_staged(self, staged: list[_Job]) -> None:
        """Store what a step has filled; the device's copies go one after the other."""
        while staged:
            self._store_group(staged.pop(0))

    def _store_group(self, job: _Job) -> None:
        chunks, memory = job.chunks, job.memory
        began = time.perf_counter()
        whole = [p for p, end in enumerate(chunks.ends) if end % self._chunk == 0]
        new = [n for n, p in enumerate(whole) if chunks.ends[p] > chunks.begin]
        try:
            with side_stream(memory.device, memory.ready):
                if new:
                    self._store_places(job, whole, new[0])
                for place, end in enumerate(chunks.ends):
                    if end > chunks.begin and end % self._chunk:
                        before = [p for p in whole if p < place]
                        self._store_places(job, [*before, place], len(before))
        except Exception as error:  # a block that is not stored is computed again one day
            LOG.warn("vLLM store", f"vLLM: a store failed: {error!r}")
        self._cache.count("store_seconds", time.perf_counter() - began)

    def _store_places(self, job: _Job, places: Sequence[int], first: int) -> None:
        """Store the chunks at `places`, a sequence, from its `first` on; they are of one length."""
        chunks, ids, group, memory = job

        def blocks(n: int) -> list[int]:
            start = chunks.start(places[n], self._chunk)
            return ids[start // group.block : chunks.ends[places[n]] // group.block]

        while first < len(places) and 0 in blocks(first):  # left by a sliding window
            first += 1
        if first == len(places):
            return

        @whole
        def gather(n: int, out: Tensors) -> None:
            memory.gather(blocks(n), out)

        self._cache.engine.store(
            group.salted(chunks.salt),
            group.keys([chunks.hashes[place] for place in places], chunks.salt),
            gather,
            start=first,
            tokens=len(blocks(first)) * group.block,
        )

    # What else the scheduler hears

    def report(self, step: int) -> Report:
        """What the scheduler is to hear of a step."""
        loads, self._ended = self._ended, []
        others, self._others = self._others, set()
        return Report(step, others, loads)

    def news(self) -> dict[str, float]:
        """What was counted since the last call."""
        return self._cache.news()

    def flush(self, seconds: float) -> bool:
        """Wait until all that was taken is stored or dropped."""
        wait(self._staged, seconds)
        return self._cache.engine.flush(seconds)

    def close(self) -> None:
        """Write what was promised and release the tiers."""
        jobs: list[Future[Any]] = [*(load.end for load in self._loads.values()), *self._staged]
        wait(jobs, 1.0)
        self._loaders.close()
        self._storer.close()
        cache.release(self._cache)
