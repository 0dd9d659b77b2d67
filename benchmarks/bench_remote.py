"""Load, store and lookup of the network backends, beside bare loops and stock clients.

    python benchmarks/bench_remote.py [--backends redis,s3] [--rounds 5] [--write]

Starts each server itself, on loopback. In every round the bare loop, the stock client and our
backend move the same values one after another; the figures are medians, a ratio is the median of
the rounds' ratios to the bare loop. A bare loop knows what comes and checks nothing; ours loads
into host buffers, as a tier does. Stores write keys that are not there. --write puts the tables
into docs/backends.md.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import remote_memcached
import remote_redis
import remote_s3
from bench_tiers import machine, timed
from rich.console import Console
from rich.table import Table

from lmcache_core import ChunkKey
from lmcache_core.backend import StorageBackend, Transfer, component
from tests.backends.redis_servers import redis_server
from tests.backends.test_memcached import memcached_server
from tests.s3_server import BUCKET, KEY_ID, SECRET, s3_server
from tests.servers import free_port, running

ROOT = Path(__file__).parents[1]
SIZES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
TOTAL = 96 << 20
"""Bytes that a round moves."""
LOOKUP = 128
TIMEOUT = 60.0


class Rival(Protocol):
    """The least that a client can do, or somebody else's client."""

    def load(self, names: Sequence[Any]) -> None:
        """Read every value."""

    def store(self, names: Sequence[Any], value: bytes) -> None:
        """Write `value` under every name."""

    def lookup(self, names: Sequence[Any]) -> None:
        """Ask for every name whether it is there."""

    def close(self) -> None:
        """Disconnect."""


class Contest(NamedTuple):
    """A backend, what it competes with, and how a key is named in the store."""

    backend: StorageBackend
    bare: Rival
    stock: Rival
    name: Callable[[ChunkKey], Any]


class Figures(NamedTuple):
    """Medians over the rounds: seconds of all three, and the rounds' ratio of bare to ours."""

    bare: float
    stock: float
    ours: float
    ratio: float


@contextlib.contextmanager
def redis_contest(folder: Path) -> Iterator[Contest]:
    """One Redis server."""
    port = free_port()
    with running(redis_server(folder, port)):
        options = {"url": f"redis://127.0.0.1:{port}"}
        backend = opened("redis", options)
        bare, stock = remote_redis.Bare(port), remote_redis.Stock(port)
        yield Contest(backend, bare, stock, lambda key: f"lmcache:{key}".encode())
        close(backend, bare, stock)


@contextlib.contextmanager
def memcached_contest(folder: Path) -> Iterator[Contest]:
    """One memcached, which takes items as large as the frames."""
    port = free_port()
    with running(memcached_server(port, "-I", "64m", "-m", "1500")):
        backend = opened("memcached", {"url": f"memcached://127.0.0.1:{port}"})
        bare, stock = remote_memcached.Bare(port), remote_memcached.Stock(port)
        yield Contest(backend, bare, stock, lambda key: f"lmcache:{key}".encode())
        close(backend, bare, stock)


@contextlib.contextmanager
def s3_contest(folder: Path) -> Iterator[Contest]:
    """One SeaweedFS."""
    with s3_server(folder) as server:
        login = f"{KEY_ID}:{SECRET.replace('/', '%2F')}"
        options = {"url": f"s3://{login}@{BUCKET}", "endpoint": server.endpoint}
        backend = opened("s3", options)
        bucket = remote_s3.Bucket(server.endpoint, BUCKET, KEY_ID, SECRET)
        bare, stock = remote_s3.Bare(bucket), remote_s3.Stock(bucket)
        yield Contest(backend, bare, stock, lambda key: f"lmcache/{str(key)[-3:]}/{key}")
        close(backend, bare, stock)


CONTESTS = {"redis": redis_contest, "memcached": memcached_contest, "s3": s3_contest}


def opened(name: str, options: dict[str, Any]) -> StorageBackend:
    """A backend as the config opens it."""
    cls = component("backends", name)
    backend: StorageBackend = cls(cls.Options(**options))
    return backend


def close(*things: Any) -> None:
    """Close each."""
    for thing in things:
        thing.close()


def compete(
    contest: Contest, keys: Sequence[ChunkKey], nbytes: int, rounds: int
) -> tuple[Figures, Figures]:
    """Load and store of `keys`, `nbytes` each."""
    names = [contest.name(key) for key in keys]
    value = random.Random(1).randbytes(nbytes)
    frames = [(key, [memoryview(value)]) for key in keys]
    backend = contest.backend

    def load() -> None:
        count = sum(1 for _ in backend.get(keys, Transfer(TIMEOUT)))
        if count != len(keys):
            raise SystemExit(f"loaded {count} of {len(keys)}")

    def store() -> None:
        if backend.put(frames, keys, Transfer(TIMEOUT)) != len(keys):
            raise SystemExit("not everything was stored")

    stores = [
        lambda: contest.bare.store(names, value),
        lambda: contest.stock.store(names, value),
        store,
    ]
    loads = [lambda: contest.bare.load(names), lambda: contest.stock.load(names), load]
    stored: list[list[float]] = []
    loaded: list[list[float]] = []
    for _ in range(rounds + 1):  # the first warms up
        stored.append([emptied(contest, keys, work) for work in stores])
        loaded.append([timed(work) for work in loads])
    backend.delete(keys, Transfer(TIMEOUT))
    return figures(loaded[1:]), figures(stored[1:])


def emptied(contest: Contest, keys: Sequence[ChunkKey], work: Callable[[], object]) -> float:
    """Seconds that `work` takes on an empty store."""
    contest.backend.delete(keys, Transfer(TIMEOUT))
    return timed(work)


def lookups(contest: Contest, keys: Sequence[ChunkKey], rounds: int) -> Figures:
    """Seconds to look LOOKUP small chunks up."""
    names = [contest.name(key) for key in keys]
    contest.backend.put([(key, [memoryview(b"x" * 1000)]) for key in keys], keys, Transfer(TIMEOUT))
    works = [
        lambda: contest.bare.lookup(names),
        lambda: contest.stock.lookup(names),
        lambda: contest.backend.contains(keys, Transfer(TIMEOUT)),
    ]
    seconds = [[timed(work) for work in works] for _ in range(4 * rounds + 1)]
    contest.backend.delete(keys, Transfer(TIMEOUT))
    return figures(seconds[1:])


def figures(seconds: Sequence[Sequence[float]]) -> Figures:
    """Medians of [bare, stock, ours] rounds."""
    bare, stock, ours = (statistics.median(row) for row in zip(*seconds, strict=True))
    return Figures(bare, stock, ours, statistics.median(row[0] / row[2] for row in seconds))


def some_keys(count: int) -> list[ChunkKey]:
    """Keys, the same in every run."""
    chance = random.Random(count)
    return [ChunkKey(chance.randbytes(32)) for _ in range(count)]


def bench(name: str, rounds: int, folder: Path) -> Table:
    """A table of one backend."""
    table = Table(title=f"{name}, loopback, GB/s; {machine()}")
    for column in ("what", "bare loop", "stock client", "ours", "ours : bare"):
        table.add_column(column, justify="left" if column == "what" else "right")
    with CONTESTS[name](folder) as contest:
        rows: list[tuple[str, list[str]]] = []
        for nbytes in SIZES:
            keys = some_keys(max(4, TOTAL // nbytes))
            size = f"{nbytes / 2**20:g} MiB"
            for what, got in zip(
                ("load", "store"), compete(contest, keys, nbytes, rounds), strict=True
            ):
                gigabytes = nbytes * len(keys) / 1e9
                speeds = [f"{gigabytes / seconds:.2f}" for seconds in got[:3]]
                rows.append((f"{what} {size}", [*speeds, f"{got.ratio:.2f}"]))
        for what, row in sorted(rows, key=lambda row: row[0].split()[0]):
            table.add_row(what, *row)
        got = lookups(contest, some_keys(LOOKUP), rounds)
        rates = [f"{LOOKUP / seconds:,.0f}" for seconds in got[:3]]
        table.add_row(f"lookups/s, {LOOKUP} at once", *rates, f"{got.ratio:.2f}")
    return table


def markdown(table: Table) -> str:
    """The same table for a document."""
    columns = [list(column.cells) for column in table.columns]
    rows = [[str(column.header) for column in table.columns], *zip(*columns, strict=True)]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" + "---:|" * (len(columns) - 1))
    return f"{table.title}\n\n" + "\n".join(lines) + "\n"


def write(name: str, table: Table) -> None:
    """Replace the backend's table in docs/backends.md."""
    path = ROOT / "docs" / "backends.md"
    begin, end = f"<!-- bench-remote {name} -->\n", f"<!-- end {name} -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    text, count = re.subn(
        pattern, lambda _: begin + "\n" + markdown(table) + "\n" + end, path.read_text(), flags=re.S
    )
    if count != 1:
        raise SystemExit(f"{path} has no place for {name}")
    path.write_text(text)


def main() -> None:
    """Print a table for each backend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backends", default=",".join(CONTESTS), help="names, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="into docs/backends.md")
    options = parser.parse_args()
    for name in options.backends.split(","):
        with tempfile.TemporaryDirectory() as folder:
            table = bench(name, options.rounds, Path(folder))
        Console().print(table)
        if options.write:
            write(name, table)


if __name__ == "__main__":
    main()
