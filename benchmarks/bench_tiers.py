"""Store, load and lookup of the local tiers, each beside the physical limit, in the same run.

    python benchmarks/bench_tiers.py [--chunks 128] [--rounds 9]

A chunk is 256 tokens of SmolLM2-135M's layout in bfloat16, 5.6 MiB. Limits, measured by the same
thread on the same bytes, alternating with what they limit:

    memcpy      one buffer into another, both in use before
    preadv      open, fstat, preadv into a buffer in use, close: one file a chunk, page cache
    pwritev     open, pwritev, close, rename: one file a chunk, page cache

"load" ends with the chunk's bytes in the engine's memory for local_cpu (one copy, as an engine
makes it), and with tensors in a host buffer, checksum verified, for disk.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import lmcache_core
from lmcache_core import KVLayout, LayerGroup, Tensors, unverified
from lmcache_core.backend import Transfer

TOKENS = 256
WEIGHTS = unverified("bench")
LAYOUT = KVLayout(
    groups=(
        LayerGroup(
            kind="attention",
            layers=tuple(range(30)),
            kv_heads=3,
            key_dim=64,
            value_dim=64,
            dtype="bfloat16",
        ),
    )
)
CHUNK = LAYOUT.bytes_per_token * TOKENS
console = Console()


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternate(
    limit: Callable[[], object], ours: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Medians of both, and the median of their ratios: noise hits both of a round alike."""
    limit()
    ours()
    return medians([(timed(limit), timed(ours)) for _ in range(rounds)])


def medians(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Of the limit's seconds, of ours, and of their ratios."""
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


class Memory:
    """An engine's KV memory: `chunks` chunks in one tensor, already in use."""

    def __init__(self, chunks: int) -> None:
        self.bytes = torch.randint(0, 255, (chunks, CHUNK), dtype=torch.uint8)
        half = CHUNK // 2
        shape = (chunks, *LAYOUT.tensors(TOKENS)[0].shape)
        self.kv = {
            "g0.k": self.bytes[:, :half].view(torch.bfloat16).view(shape),
            "g0.v": self.bytes[:, half:].view(torch.bfloat16).view(shape),
        }

    def gather(self, index: int, out: Tensors) -> None:
        """Chunk `index` out of this memory."""
        for name, tensor in self.kv.items():
            out[name].copy_(tensor[index])

    def scatter(self, index: int, tensors: Tensors) -> None:
        """Chunk `index` into this memory."""
        for name, tensor in self.kv.items():
            tensor[index].copy_(tensors[name])


def bench_local_cpu(chunks: int, rounds: int, table: Table) -> None:
    """Store and load against memcpy. The tier is full, as it is after the first minutes: each
    chunk that is stored evicts an older one, whose memory the next takes over."""
    source, target = Memory(chunks), Memory(chunks)
    capacity = chunks * (CHUNK + 4096)
    with lmcache_core.open({"tiers": [{"backend": "local_cpu", "capacity": capacity}]}) as cache:
        namespace = cache.namespace(model="bench", layout=LAYOUT, weights=WEIGHTS)
        prompts = [range(first, first + chunks * TOKENS) for first in (0, 1)]
        sequences = itertools.cycle([cache.keys(namespace, list(ids)) for ids in prompts])
        keys = next(sequences)

        def copy() -> None:
            for index in range(chunks):
                target.bytes[index].copy_(source.bytes[index])

        def store() -> None:
            nonlocal keys
            keys = next(sequences)
            if cache.store(namespace, keys, source.gather) != chunks:
                raise SystemExit("not everything was stored")

        def load() -> None:
            for chunk in cache.load(keys, shared=True):
                target.scatter(chunk.index, chunk.tensors)

        store()
        add(table, "local_cpu store", "memcpy", chunks, alternate(copy, store, rounds))
        add(table, "local_cpu load", "memcpy", chunks, alternate(copy, load, rounds))
        if not torch.equal(source.bytes, target.bytes):
            raise SystemExit("loaded bytes differ")


def bench_disk(chunks: int, rounds: int, table: Table, folder: Path) -> None:
    """Store and load against bare files."""
    source = Memory(chunks)
    bare = BareFiles(folder / "bare", source)
    config = {
        "backend": "disk",
        "path": str(folder / "ours"),
        "capacity": "1TiB",
        "deadline": "60s",
        "queue": "1TiB",
    }
    with lmcache_core.open({"tiers": [config]}) as cache:
        namespace = cache.namespace(model="bench", layout=LAYOUT, weights=WEIGHTS)
        keys = cache.keys(namespace, list(range(chunks * TOKENS)))

        def store() -> None:
            cache.store(namespace, keys, source.gather)
            cache.flush()

        def load() -> None:
            count = sum(1 for _ in cache.load(keys, shared=True))
            if count != chunks:
                raise SystemExit(f"loaded {count} of {chunks} chunks")

        pairs = []
        for _ in range(rounds + 1):
            cache._tiers[0]._backend.delete(keys, Transfer(10.0))
            bare.remove()
            pairs.append((timed(bare.write), timed(store)))
        add(table, "disk store", "pwritev", chunks, medians(pairs[1:]))
        add(table, "disk load", "preadv", chunks, alternate(bare.read, load, rounds))


class BareFiles:
    """The least that whole-or-nothing files take, one a chunk."""

    def __init__(self, folder: Path, source: Memory) -> None:
        folder.mkdir()
        self._files = [str(folder / str(index)) for index in range(len(source.bytes))]
        self._sources = [memoryview(row.numpy()) for row in source.bytes]
        self._targets = [memoryview(bytearray(CHUNK)) for _ in range(4)]

    def remove(self) -> None:
        """So that the next write makes new files."""
        for file in self._files:
            Path(file).unlink(missing_ok=True)

    def write(self) -> None:
        """Create, write, rename."""
        for file, buffer in zip(self._files, self._sources, strict=True):
            fd = os.open(f"{file}.tmp", os.O_WRONLY | os.O_CREAT, 0o600)
            done = 0
            while done < buffer.nbytes:
                done += os.pwritev(fd, [buffer[done:]], done)
            os.close(fd)
            os.rename(f"{file}.tmp", file)

    def read(self) -> None:
        """Open, ask for the size, read into memory in use."""
        for number, file in enumerate(self._files):
            buffer = self._targets[number % len(self._targets)]
            fd = os.open(file, os.O_RDONLY)
            os.fstat(fd)
            done = 0
            while done < buffer.nbytes:
                done += os.preadv(fd, [buffer[done:]], done)
            os.close(fd)


def bench_lookup(rounds: int, folder: Path) -> Table:
    """A 32k-token prompt, 128 chunks: keys from tokens, then all hit or all miss."""
    table = Table(title="Lookup of a 32,768-token prompt (128 chunks), milliseconds")
    for column in ("tiers", "keys", "all hit", "all miss"):
        table.add_column(column, justify="left" if column == "tiers" else "right")
    small = KVLayout(
        groups=(LayerGroup(kind="attention", layers=(0,), kv_heads=1, key_dim=1, value_dim=1,
                           dtype="bfloat16"),)
    )  # fmt: skip
    memory = {"backend": "local_cpu", "capacity": "1GiB"}
    disk = {"backend": "disk", "path": str(folder), "capacity": "1GiB"}
    for tiers in ([memory], [disk], [memory, disk]):
        with lmcache_core.open({"tiers": tiers}) as cache:
            namespace = cache.namespace(model="bench", layout=small, weights=WEIGHTS)
            prompt = torch.arange(32768)
            keys = cache.keys(namespace, prompt)
            other = cache.keys(namespace, prompt + 1)
            cache.store(namespace, keys, lambda index, out: [t.zero_() for t in out.values()])
            cache.flush()
            row = [
                median_ms(lambda: cache.keys(namespace, prompt), rounds),  # noqa: B023
                median_ms(lambda: cache.lookup(keys), rounds),  # noqa: B023
                median_ms(lambda: cache.lookup(other), rounds),  # noqa: B023
            ]
        name = " + ".join(tier["backend"] for tier in tiers)
        table.add_row(name, *(f"{value:.2f}" for value in row))
    return table


def median_ms(work: Callable[[], object], rounds: int) -> float:
    """Median over many calls, in milliseconds."""
    return 1e3 * statistics.median(timed(work) for _ in range(20 * rounds))


def add(
    table: Table, name: str, limit: str, chunks: int, medians: tuple[float, float, float]
) -> None:
    """One row: GB/s of the limit and of ours, and the ratio."""
    gigabytes = chunks * CHUNK / 1e9
    bare, ours, ratio = medians
    table.add_row(name, limit, f"{gigabytes / bare:.1f}", f"{gigabytes / ours:.1f}", f"{ratio:.2f}")


def machine() -> str:
    """The processor, for the table's title."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {os.cpu_count()} CPUs"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--chunks", type=int, default=64, help="chunks in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", type=Path, help="where the disk tier writes")
    options = parser.parse_args()
    torch.set_num_threads(1)  # one copying thread on both sides
    table = Table(title=f"{options.chunks} chunks of {CHUNK / 2**20:.1f} MiB, GB/s; {machine()}")
    for column in ("what", "limit", "limit GB/s", "ours GB/s", "ratio"):
        table.add_column(column, justify="right" if "/" in column else "left")
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder = Path(name)
        bench_local_cpu(options.chunks, options.rounds, table)
        bench_disk(options.chunks, options.rounds, table, folder)
        console.print(table)
        console.print(bench_lookup(options.rounds, folder / "lookup"))


if __name__ == "__main__":
    main()
