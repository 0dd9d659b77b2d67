"""The shared-memory tier beside what else one would do, in the same run.

    python benchmarks/bench_shm.py [--rounds 15]

A chunk of 256 tokens in bfloat16 takes 5.6 MiB for SmolLM2-135M, 32 MiB for an 8B Llama 3.

    store      engine memory to a chunk that others see; limit: memcpy of the same bytes into shared
               memory, all of it in use before on both sides
    load       lookup to usable tensors of one chunk, by its size; beside a dictionary of tensors,
               a multiprocessing queue with pickle, and reading a file in the page cache
    visible    how long after `store` returned another process, which polls, has the tensors
    lookup     of 128 chunks by each of four processes that do nothing else
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_tiers import CHUNK, LAYOUT, TOKENS, WEIGHTS, Memory, alternate, console, machine, timed
from rich.table import Table

import lmcache_core
from lmcache_backends.shm import main as shm
from lmcache_core import CacheEngine, ChunkKey, KVLayout, LayerGroup, Namespace, Tensors

POOL = f"bench-{os.getpid()}"


def opened(capacity: int, pool: str = POOL) -> CacheEngine:
    """An engine whose only tier is the pool."""
    return lmcache_core.open({"tiers": [{"backend": "shm", "pool": pool, "capacity": capacity}]})


@contextmanager
def pooled(capacity: int) -> Iterator[CacheEngine]:
    """The same, for a pool that is removed afterwards."""
    with opened(capacity) as cache:
        try:
            yield cache
        finally:
            shm(["clear", POOL])


def bench_store(kib: int, total: int, rounds: int, table: Table) -> None:
    """Into a full pool: each chunk evicts an older one, as it is after the first minutes."""
    nbytes = kib << 10
    chunks = total // nbytes
    source = torch.randint(0, 255, (chunks, nbytes), dtype=torch.uint8)
    target = source.clone().share_memory_()
    halves = source.view(torch.bfloat16).view(chunks, 2, 1, 1, TOKENS, kib)
    with pooled((chunks + 1) * (nbytes + nbytes // 16)) as cache:
        namespace = cache.namespace(model="bench", layout=layout(kib), weights=WEIGHTS)
        prompts = [range(first, first + chunks * TOKENS) for first in (0, 1, 2)]
        sequences = itertools.cycle([cache.keys(namespace, list(ids)) for ids in prompts])

        def copy() -> None:
            for index in range(chunks):
                target[index].copy_(source[index])

        def gather(index: int, out: Tensors) -> None:
            for half, tensor in zip(halves[index], out.values(), strict=True):
                tensor.copy_(half)

        def store() -> None:
            if cache.store(namespace, next(sequences), gather) != chunks:
                raise SystemExit("not everything was stored")

        for _ in range(3):  # so that this process has seen every page
            store()
        bare, ours, ratio = alternate(copy, store, rounds)
        gigabytes = source.nbytes / 1e9
        row = f"{gigabytes / bare:.1f}", f"{gigabytes / ours:.1f}", f"{ratio:.2f}"
        table.add_row(f"{kib / 1024:g} MiB", *row)


def layout(kib: int) -> KVLayout:
    """One whose chunk of 256 tokens takes that many KiB."""
    group = LayerGroup(
        kind="attention", layers=(0,), kv_heads=1, key_dim=kib, value_dim=kib, dtype="bfloat16"
    )
    return KVLayout(groups=(group,))


def bench_load(rounds: int) -> Table:
    """Of one chunk, at sizes a hundredfold apart."""
    table = Table(title="lookup and load of one chunk, microseconds (and times shm)")
    for column in ("chunk", "shm", "local dict", "file in page cache", "queue and pickle"):
        table.add_column(column, justify="right")
    for kib in (64, 512, 4096, 32768):
        with pooled(128 << 20) as cache, tempfile.TemporaryDirectory() as folder:
            namespace = cache.namespace(model="bench", layout=layout(kib), weights=WEIGHTS)
            keys = cache.keys(namespace, list(range(TOKENS)))
            cache.store(namespace, keys, lambda index, out: [t.fill_(1) for t in out.values()])
            (chunk,) = cache.load(keys, shared=True)
            ours, *others = (
                1e6 * statistics.median(timed(work) for _ in range(20 * rounds))
                for work in (
                    lambda: list(cache.load(keys, shared=True)),  # noqa: B023
                    from_dict(keys, chunk.tensors),
                    from_file(Path(folder) / "chunk", chunk.tensors),
                )
            )
            others.append(1e6 * statistics.median(through_queue(chunk.tensors, rounds)))
            cells = [f"{other:,.0f} ({other / ours:.2g})" for other in others]
            table.add_row(f"{chunk.nbytes / 2**20:g} MiB", f"{ours:,.0f}", *cells)
            del chunk
    return table


def from_dict(keys: list[ChunkKey], tensors: Tensors) -> Callable[[], object]:
    """The least there is: one look into a dictionary of this process."""
    local = {keys[0]: tensors}
    return lambda: local.get(keys[0])


def from_file(path: Path, tensors: Tensors) -> Callable[[], object]:
    """Read into memory in use, then tensors on it."""
    path.write_bytes(b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors.values()))
    buffer = bytearray(path.stat().st_size)
    specs = [(tensor.dtype, tensor.shape) for tensor in tensors.values()]

    def read() -> object:
        with path.open("rb", 0) as file:
            file.readinto(buffer)
        whole = torch.frombuffer(buffer, dtype=torch.bfloat16)
        sizes = [shape.numel() for _, shape in specs]
        return [p.view(s) for p, (_, s) in zip(whole.split(sizes), specs, strict=True)]

    return read


def through_queue(tensors: Tensors, rounds: int) -> list[float]:
    """Ask another process for the bytes, and get them pickled."""
    context = multiprocessing.get_context("spawn")
    asked, answers = context.SimpleQueue(), context.SimpleQueue()
    parts = [tensor.view(torch.uint8).numpy() for tensor in tensors.values()]
    server = context.Process(target=serve, args=(parts, asked, answers))
    server.start()

    def ask() -> object:
        asked.put(True)
        return [torch.from_numpy(part) for part in answers.get()]

    ask()
    times = [timed(ask) for _ in range(rounds)]
    asked.put(False)
    server.join()
    return times


def serve(parts: Any, asked: Any, answers: Any) -> None:
    """What holds the chunks where nothing is shared."""
    while asked.get():
        answers.put(parts)


def bench_visible(rounds: int) -> float:
    """Median milliseconds from the return of `store` to tensors in another process."""
    capacity = 4 * CHUNK
    context = multiprocessing.get_context("spawn")
    seen = context.SimpleQueue()
    source = Memory(1)
    with pooled(capacity) as cache:
        namespace = cache.namespace(model="bench", layout=LAYOUT, weights=WEIGHTS)
        sequences = [cache.keys(namespace, list(range(n, n + TOKENS))) for n in range(rounds)]
        reader = context.Process(target=watch, args=(POOL, capacity, sequences, seen))
        reader.start()
        seen.get()
        delays = []
        for keys in sequences:
            time.sleep(0.02)
            cache.store(namespace, keys, source.gather)
            stored = time.monotonic()
            delays.append(1e3 * max(0.0, seen.get() - stored))
        reader.join()
    return statistics.median(delays)


def watch(pool: str, capacity: int, sequences: list[list[ChunkKey]], seen: Any) -> None:
    """Poll for each chunk in turn; say when its tensors were there."""
    with opened(capacity, pool) as cache:
        seen.put(0.0)
        for keys in sequences:
            while not list(cache.load(keys, shared=True)):
                time.sleep(50e-6)
            seen.put(time.monotonic())


def bench_lookup(rounds: int) -> str:
    """Each of four processes looks 128 chunks up, as fast as it can."""
    capacity = 64 << 20
    context = multiprocessing.get_context("spawn")
    times = context.SimpleQueue()
    start = context.Barrier(4)
    with pooled(capacity) as cache:
        namespace = cache.namespace(model="bench", layout=layout(1), weights=WEIGHTS)
        keys = cache.keys(namespace, list(range(128 * TOKENS)))
        cache.store(namespace, keys, lambda index, out: [t.zero_() for t in out.values()])
        arguments = (POOL, capacity, namespace, keys, start, 100 * rounds, times)
        workers = [context.Process(target=look, args=arguments) for _ in range(4)]
        for worker in workers:
            worker.start()
        every = sorted(t for _ in workers for t in times.get())
        for worker in workers:
            worker.join()
    fastest, middle, late = (1e3 * every[len(every) * n // 100] for n in (0, 50, 90))
    return f"fastest {fastest:.3f} ms, median {middle:.3f} ms, 90 % {late:.3f} ms"


def look(
    pool: str, capacity: int, namespace: Namespace, keys: list[ChunkKey], start: Any, n: int,
    times: Any,
) -> None:  # fmt: skip
    """Time lookups once all are ready."""
    torch.set_num_threads(1)
    with opened(capacity, pool) as cache:
        if cache.lookup(keys).chunks != len(keys):
            raise SystemExit("not everything was found")
        start.wait()
        times.put([timed(lambda: cache.lookup(keys)) for _ in range(n)])


def main() -> None:
    """Print all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)  # one copying thread on both sides
    table = Table(title=f"store, GB/s; {machine()}")
    for column in ("chunk", "memcpy", "shm", "ratio"):
        table.add_column(column, justify="right")
    for kib in (1024, 5760, 32768):
        bench_store(kib, 192 << 20, options.rounds, table)
    console.print(table)
    console.print(bench_load(options.rounds))
    console.print(f"visible to a second process after store returned: {bench_visible(200):.3f} ms")
    console.print(f"lookup of 128 chunks, four processes at it: {bench_lookup(options.rounds)}")


if __name__ == "__main__":
    main()
