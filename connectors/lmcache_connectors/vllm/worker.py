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
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig

from lmcache_connectors.vllm import cache, weights
from lmcache_connectors.vllm.chunks import Chunks, all_or_nothing
from lmcache_connectors.vllm.memory import GroupMemory
from lmcache_connectors.vllm.messages import Metadata, Report
from lmcache_connectors.vllm.packing import Packing, layer_write, prove
from lmcache_core import LOG, ConfigError, DaemonPool, Hit, Tensors, run_threads_on, side_stream

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


class Worker:
    """Of one rank."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig) -> None:
        """Raises ConfigError for what cannot be stored, RuntimeError where no thread can be had."""
        self._config, self._kv = config, kv
        self._memory: list[GroupMemory] = []
        self._loads: dict[str, Future[set[int]]] = {}
        self._failed_blocks: set[int] = set()
        self._whole = False
        """Whether a load is of use only if all of it comes."""
        self._ended: list[tuple[int, int, float]] = []
        """Loads of which the scheduler has not heard; see `Report`."""
        self._staged: list[Future[None]] = []
        self._weights = weights.changes()
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
        shape = self._cache.shape(self._config, self._kv)
        self._chunk = shape.chunk
        self._groups = shape.groups(self._rank)
        for spec, group in zip(self._kv.kv_cache_groups, self._groups, strict=True):
            layout = group.namespace.layout.groups[0]
            mine = [layers[name] for name in spec.layer_names]
            memory = GroupMemory(mine, layout, group.block, group.packing)
            memory.prove()
            if group.packing and layout.value_dim:
                self._prove_packing(group.packing, spec.layer_names[0], mine[0])
            self._memory.append(memory)
        self._whole = all_or_nothing(self._groups)
        self._cache.engine.warm([group.namespace for group in self._groups])

    def _prove_packing(self, packing: Packing, name: str, memory: torch.Tensor) -> None:
        """See that the layer itself writes keys and values so. Raises ConfigError."""
        layer = self._config.compilation_config.static_forward_context[name]
        if not prove(packing, layer_write(layer), memory):
            raise ConfigError(f"vLLM does not pack keys and values as in {packing.name}")

    # Loading

    def begin(self, step: Metadata) -> None:
        """Start the step's loads."""
        for chunks in step.loads:
            load = partial(self._load, chunks, step.weights != self._weights_now())
            self._loads[chunks.request] = self._loaders.submit(load)
        if step.idle and self._loads:
            wait(self._loads.values(), IDLE_SECONDS, return_when="FIRST_COMPLETED")

    def _load(self, chunks: Chunks, stale: bool) -> set[int]:
        """Returns the blocks that did not come."""
        began, pays = time.perf_counter(), self._cache.engine.load_gate
        begun = pays.begin()
        missing = [self._load_group(n, chunks, stale) for n in range(len(self._groups))]
        seconds = pays.end(begun)
        if self._rank == 0 and not stale:  # one load, however many ranks; none that read nothing
            self._ended.append((self._slowest(chunks), self._came(chunks, missing), seconds))
        self._cache.count("loads", 1)
        self._cache.count("load_seconds", time.perf_counter() - began)
        if any(missing):
            self._cache.count("failed_loads", 1)
        return {block for blocks in missing for block in blocks}

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

    def _load_group(self, number: int, chunks: Chunks, stale: bool) -> list[int]:
        """The blocks of a group that did not come."""
        group, memory, ids = self._groups[number], self._memory[number], chunks.block_ids[number]
        done = first = chunks.first_block(number, group.block)
        last = chunks.end // group.block
        place = chunks.place(first * group.block)
        keys = group.keys(chunks.hashes, chunks.salt)
        hit = Hit(tuple(keys), tuple(chunks.tiers[self._rank][number]))
        try:
            with side_stream(memory.device):
                for chunk in () if stale else self._cache.engine.load(hit, start=place):
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
        ended = {name for name, load in self._loads.items() if load.done()}
        failed: set[str] = set()
        for name in ended:
            missing = self._loads.pop(name).result()
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
        if not step.stores or step.weights != self._weights_now():
            return
        jobs = [(n, chunks) for chunks in step.stores for n in range(len(self._memory))]
        if self._memory[0].device.type == "cpu":
            for number, chunks in jobs:
                self._store_group(number, chunks, self._memory[number])
            return
        # Copied on the device, in the order of its work, so that vLLM may overwrite the blocks at
        # once; from there to the host while it computes on.
        self._staged = [job for job in self._staged if not job.done()]
        try:
            staged = len(self._staged) < STAGED and [self._stage(*job) for job in jobs]
        except torch.OutOfMemoryError:  # vLLM's work comes first
            staged = False
        if staged:
            self._staged.append(self._storer.submit(partial(self._store_staged, staged)))
        else:
            self._cache.count("stores_skipped", len(step.stores))

    def _stage(self, number: int, chunks: Chunks) -> tuple[int, Chunks, GroupMemory]:
        """The blocks of a group that are to be stored, copied on the device."""
        first = chunks.begin // self._chunk * self._chunk // self._groups[number].block
        return number, chunks, self._memory[number].staged(chunks.block_ids[number][first:])

    def _store_staged(self, staged: list[tuple[int, Chunks, GroupMemory]]) -> None:
        """Store what a step has filled; the device's copies go one after the other."""
        while staged:
            self._store_group(*staged.pop(0))

    def _store_group(self, number: int, chunks: Chunks, memory: GroupMemory) -> None:
        began = time.perf_counter()
        whole = [p for p, end in enumerate(chunks.ends) if end % self._chunk == 0]
        new = [n for n, p in enumerate(whole) if chunks.ends[p] > chunks.begin]
        try:
            with side_stream(memory.device, memory.ready):
                if new:
                    self._store_places(number, chunks, memory, whole, new[0])
                for place, end in enumerate(chunks.ends):
                    if end > chunks.begin and end % self._chunk:
                        before = [p for p in whole if p < place]
                        self._store_places(number, chunks, memory, [*before, place], len(before))
        except Exception as error:  # a block that is not stored is computed again one day
            LOG.warn("vLLM store", f"vLLM: a store failed: {error!r}")
        self._cache.count("store_seconds", time.perf_counter() - began)

    def _store_places(
        self, number: int, chunks: Chunks, memory: GroupMemory, places: Sequence[int], first: int
    ) -> None:
        """Store the chunks at `places`, a sequence, from its `first` on; they are of one length."""
        group, ids = self._groups[number], chunks.block_ids[number]

        def blocks(n: int) -> list[int]:
            start = chunks.start(places[n], self._chunk)
            return ids[start // group.block : chunks.ends[places[n]] // group.block]

        while first < len(places) and 0 in blocks(first):  # left by a sliding window
            first += 1
        if first == len(places):
            return

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

    def _weights_now(self) -> int:
        return weights.changes() - self._weights

    def report(self, step: int) -> Report:
        """What the scheduler is to hear of a step."""
        loads, self._ended = self._ended, []
        return Report(step, self._weights_now(), loads)

    def news(self) -> dict[str, float]:
        """What was counted since the last call."""
        return self._cache.news()

    def flush(self, seconds: float) -> bool:
        """Wait until all that was taken is stored or dropped."""
        wait(self._staged, seconds)
        return self._cache.engine.flush(seconds)

    def close(self) -> None:
        """Write what was promised and release the tiers."""
        jobs: list[Future[Any]] = [*self._loads.values(), *self._staged]
        wait(jobs, 1.0)
        self._loaders.close()
        self._storer.close()
        cache.release(self._cache)
