"""What each call costs while a real store fails, and what is lost: the table in docs/reliability.md.

    python -m tests.backends.reliability [--rounds 3] [--store redis] [--fault silent] [--write]

Real servers behind a proxy that does what networks do; a directory and a pool of shared memory
whose locks somebody else holds, or whose system calls hang.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

import lmcache_core
from lmcache_core import CacheEngine, Hit, KVLayout, LayerGroup, Namespace, Tensors, unverified
from tests.backends.frames import key
from tests.backends.redis_servers import redis_server
from tests.backends.test_memcached import memcached_server
from tests.s3_server import BUCKET, KEY_ID, SECRET, s3_server
from tests.servers import PATIENCE, Proxy, Server, free_port, running

CHUNKS = 8
TOKENS = 4096
"""512 KiB of KV a chunk."""
LOADS = 8
"""At a time, as vLLM's connector has them."""
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- reliability: written by make reliability -->", "<!-- end of reliability -->"
_LAYOUT = KVLayout(
    groups=(
        LayerGroup(
            kind="attention", layers=(0, 1), kv_heads=2, key_dim=8, value_dim=8, dtype="bfloat16"
        ),
    )
)
_NAMESPACE = Namespace(model="org/model@main", layout=_LAYOUT, weights=unverified("w"))


@dataclass
class Store:
    """A store that runs, and a tier on it.

    `proxy` and `server` where it has them; `folder` where its files lie.
    """

    name: str
    tier: dict[str, Any]
    proxy: Proxy | None = None
    server: Server | None = None
    lock: Path | None = None
    """The file by whose lock processes take turns."""
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def heal(self) -> None:
        """End whatever fault there is."""
        self.undo.close()
        if self.proxy is not None:
            self.proxy.heal()


class Fault(NamedTuple):
    """What is done to a store. Some lose chunks by their nature, so that they are stored anew."""

    name: str
    begin: Callable[[Store], object]
    loses: bool = False


def _set(**faults: object) -> Callable[[Store], object]:
    """What a proxy does to answers."""
    return lambda store: vars(store.proxy).update(faults)


def _kill(store: Store) -> None:
    assert store.server is not None
    store.server.kill()
    store.undo.callback(store.server.start)


def _freeze(store: Store) -> None:
    assert store.server is not None
    store.server.freeze()
    store.undo.callback(store.server.thaw)


_HOLD = """
import fcntl, os, sys
held = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(held, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


def _hold(store: Store) -> None:
    """Another process stops while it has the lock."""
    command = [sys.executable, "-c", _HOLD, str(store.lock)]
    pipe = subprocess.PIPE
    other = subprocess.Popen(command, stdin=pipe, stdout=pipe)
    assert other.stdout is not None
    other.stdout.readline()
    other.send_signal(signal.SIGSTOP)
    store.undo.callback(_end, other)


def _end(process: subprocess.Popen[bytes]) -> None:
    with process:
        process.kill()


def _hang(*names: str) -> Callable[[Store], None]:
    """System calls that do not return while the fault lasts."""

    def begin(store: Store) -> None:
        healed = threading.Event()
        for name in names:
            call = getattr(os, name)

            def hang(*args: Any, call: Callable[..., Any] = call, **options: Any) -> Any:
                if threading.current_thread().name.startswith("lmcache"):
                    healed.wait()
                return call(*args, **options)

            store.undo.enter_context(mock.patch.object(os, name, hang))
        store.undo.callback(healed.set)

    return begin


_GARBAGE = random.Random(1).randbytes(64)
_HTTP = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

NETWORK = [
    Fault("refuses", lambda store: _of(store).refuse()),
    Fault("is silent", _set(stall_after=0)),
    Fault("cuts in mid-value", _set(cut_after=700_000)),
    Fault("brings nothing after 300 kB", _set(stall_after=300_000)),
    Fault("brings nothing after 2.5 MB", _set(stall_after=2_500_000)),
    Fault("trickles, a byte each 100 ms", _set(rate=10.0)),
    Fault("sends 200 kB/s", _set(rate=200_000.0)),
    Fault("sends garbage", _set(says=_GARBAGE), loses=True),
    Fault("speaks HTTP", _set(says=_HTTP), loses=True),
    Fault("answers what nobody asked", _set(first=b"+OK\r\n"), loses=True),
    Fault("answers after 5 deadlines", lambda store: _delay(store, 5.0)),
    Fault("answers after 0.9 deadlines", lambda store: _delay(store, 0.9)),
    Fault("swallows packets", lambda store: _of(store).darken()),
    Fault("swallows large packets", _set(largest=2000)),
    Fault("is killed and started anew", _kill, loses=True),
    Fault("is frozen", _freeze),
]
FILES = [
    Fault("reads hang", _hang("preadv", "pread", "readv")),
    Fault("writes hang", _hang("pwritev", "pwrite", "writev")),
    Fault("a lock is held by a process that stopped", _hold),
]
MEMORY = [Fault("a lock is held by a process that stopped", _hold)]


def _of(store: Store) -> Proxy:
    assert store.proxy is not None
    return store.proxy


def _delay(store: Store, deadlines: float) -> None:
    _of(store).delay = deadlines * store.tier["deadline"]


@contextlib.contextmanager
def redis_store(folder: Path) -> Iterator[Store]:
    port = free_port()
    with running(redis_server(folder, port)) as server, Proxy(port) as proxy:
        tier = {"backend": "redis", "url": f"redis://127.0.0.1:{proxy.port}"}
        yield Store("redis", tier, proxy, server)


@contextlib.contextmanager
def memcached_store(folder: Path) -> Iterator[Store]:
    port = free_port()
    with running(memcached_server(port)) as server, Proxy(port) as proxy:
        tier = {"backend": "memcached", "url": f"memcached://127.0.0.1:{proxy.port}"}
        yield Store("memcached", tier, proxy, server)


@contextlib.contextmanager
def s3_store(folder: Path) -> Iterator[Store]:
    with s3_server(folder) as server, Proxy(server.port) as proxy:
        url = f"s3://{KEY_ID}:{SECRET.replace('/', '%2F')}@{BUCKET}"
        tier = {"backend": "s3", "url": url, "endpoint": f"http://127.0.0.1:{proxy.port}"}
        yield Store("s3", tier, proxy, server)


@contextlib.contextmanager
def disk_store(folder: Path) -> Iterator[Store]:
    path = folder / "cache"
    tier = {"backend": "disk", "path": str(path), "capacity": "64MiB"}
    yield Store("disk", tier, lock=path / "usage")


@contextlib.contextmanager
def shm_store(folder: Path) -> Iterator[Store]:
    pool = f"reliability-{os.getpid()}"
    path = Path(f"/dev/shm/lmcache-{os.getuid()}-{pool}")
    tier = {"backend": "shm", "pool": pool, "capacity": "16MiB"}
    try:
        yield Store("shm", tier, lock=path)
    finally:
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()


STORES: dict[str, tuple[Callable[[Path], Any], Sequence[Fault]]] = {
    "redis": (redis_store, NETWORK),
    "memcached": (memcached_store, NETWORK),
    "s3": (s3_store, NETWORK),
    "disk": (disk_store, FILES),
    "shm": (shm_store, MEMORY),
}


@dataclass
class Outcome:
    """What a fault cost: seconds by call, and chunks of CHUNKS that were lost or wrong."""

    waits: dict[str, float] = field(default_factory=dict)
    recovery: float = 0.0
    """Seconds from the fault's end until all is served again."""
    lost: int = 0
    wrong: int = 0

    def worse(self, other: Outcome) -> Outcome:
        """The worst of both."""
        waits = {call: max(wait, other.waits[call]) for call, wait in self.waits.items()}
        return Outcome(
            waits,
            max(self.recovery, other.recovery),
            max(self.lost, other.lost),
            self.wrong + other.wrong,
        )


_NUMBERS = itertools.count(CHUNKS * TOKENS)
"""For chunks that no store has."""


class Trial:
    """One store and one fault."""

    def __init__(self, store: Store, fault: Fault, deadline: float) -> None:
        self._store, self._fault = store, fault
        store.tier["deadline"] = deadline
        self._deadline = deadline
        self._keys = _NAMESPACE.keys(range(CHUNKS * TOKENS), TOKENS)
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Each call while the fault lasts, each from a tier that was in use when it began."""
        with self._open() as engine:
            self._fill(engine)
            hit = engine.lookup(self._keys)
            self._fails(engine, "load", lambda engine: self._load(engine, hit))
            self._fails(engine, "lookup", lambda engine: engine.lookup(self._keys))
            self._fails(engine, "8 loads", lambda engine: self._loads(engine, hit))
            self._fails(engine, "store", self._begin_store, then=("flush", CacheEngine.flush))
            self._told(engine)
        self._opens_and_closes()
        return self._outcome

    def _open(self) -> CacheEngine:
        return lmcache_core.open({"chunk_size": TOKENS, "tiers": [self._store.tier]})

    def _fails(
        self,
        engine: CacheEngine,
        name: str,
        call: Callable[[CacheEngine], object],
        then: tuple[str, Callable[[CacheEngine], object]] | None = None,
    ) -> None:
        """The call, while the store fails; then all is to be served again."""
        engine.flush(PATIENCE)  # of what is behind an earlier one
        self._fault.begin(self._store)
        try:
            self._time(name, lambda: call(engine))
            if then is not None:
                self._time(then[0], lambda: then[1](engine))
        finally:
            self._store.heal()
        began = time.monotonic()
        lost = CHUNKS - self._comes_back(engine)
        self._outcome.recovery = max(self._outcome.recovery, time.monotonic() - began)
        if lost:
            self._outcome.lost = max(self._outcome.lost, lost)
            self._fill(engine)

    def _time(self, name: str, call: Callable[[], object]) -> None:
        began = time.monotonic()
        call()
        took = time.monotonic() - began
        self._outcome.waits[name] = max(self._outcome.waits.get(name, 0.0), took)

    def _comes_back(self, engine: CacheEngine) -> int:
        """Wait until all is loaded; or, where the fault loses chunks, until the store is asked
        again. How many there are."""
        end = time.monotonic() + PATIENCE
        while True:
            have = self._load(engine)
            if have == CHUNKS or (self._fault.loses and self._is_asked(engine)):
                return have
            if time.monotonic() > end:
                raise AssertionError(f"{have} of {CHUNKS} chunks {PATIENCE} s after the fault")
            time.sleep(0.01)

    def _is_asked(self, engine: CacheEngine) -> bool:
        asked = ("looked_up", engine.tiers[0].name)
        before = engine.stats().get(asked, 0)
        engine.lookup(self._keys)
        return engine.stats().get(asked, 0) > before

    def _fill(self, engine: CacheEngine) -> None:
        """Store all, however often that takes."""
        end = time.monotonic() + PATIENCE
        while engine.lookup(self._keys).chunks < CHUNKS:
            assert time.monotonic() < end
            engine.store(_NAMESPACE, self._keys, _gather)
            engine.flush(PATIENCE)
            time.sleep(0.01)

    def _load(self, engine: CacheEngine, hit: Hit | None = None) -> int:
        count = 0
        for chunk in engine.load(hit or self._keys):
            self._outcome.wrong += not _is_right(chunk.index, chunk.tensors)
            count += 1
        return count

    def _loads(self, engine: CacheEngine, hit: Hit) -> None:
        with ThreadPoolExecutor(LOADS) as threads:
            list(threads.map(lambda _: self._load(engine, hit), range(LOADS)))

    def _begin_store(self, engine: CacheEngine) -> None:
        """A chunk that nobody has."""
        tokens = [next(_NUMBERS)] * TOKENS
        engine.store(_NAMESPACE, _NAMESPACE.keys(tokens, TOKENS), _gather)

    def _told(self, engine: CacheEngine) -> None:
        """What a tier tells its store behind the engine's back."""
        tier, absent = engine._tiers[0], [key(1), key(2)]
        for name, call in {
            "touch": lambda transfer: tier._backend.touch(absent, transfer),
            "delete": lambda transfer: tier._backend.delete(absent, transfer),
            "ping": lambda transfer: tier._backend.ping(transfer),
        }.items():
            self._fails(engine, name, lambda _, call=call: _quietly(lambda: tier._call(call)))

    def _opens_and_closes(self) -> None:
        """`open` of a store that fails already, and `close` with chunks that are to be written."""
        self._fault.begin(self._store)
        try:
            opened: list[CacheEngine] = []
            self._time("open", lambda: opened.append(self._open()))
            self._time("close", opened[0].close)
        finally:
            self._store.heal()
        with self._open() as engine:
            self._fill(engine)
            engine.flush(PATIENCE)
            self._fault.begin(self._store)
            try:
                self._begin_store(engine)
                self._time("close", engine.close)
            finally:
                self._store.heal()


def _quietly(call: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):
        call()


@functools.cache
def _content(index: int) -> Tensors:
    generator = torch.Generator().manual_seed(index)
    return {
        spec.name: torch.randint(-9, 9, spec.shape, generator=generator).to(torch.bfloat16)
        for spec in _LAYOUT.tensors(TOKENS)
    }


def _gather(index: int, out: Tensors) -> None:
    for name, tensor in out.items():
        tensor.copy_(_content(index)[name])


def _is_right(index: int, tensors: Tensors) -> bool:
    return all(torch.equal(tensor, _content(index)[name]) for name, tensor in tensors.items())


CALLS = ("open", "lookup", "load", "8 loads", "store", "flush", "touch", "delete", "ping", "close")


def tried(store: Store, fault: Fault, deadline: float, rounds: int) -> Outcome:
    """The worst of some rounds."""
    outcomes = [Trial(store, fault, deadline).run() for _ in range(rounds)]
    return functools.reduce(Outcome.worse, outcomes)


def row(fault: Fault, outcome: Outcome, limit: float) -> str:
    """A line of the page."""
    waits = [outcome.waits[call] for call in CALLS]
    cells = [f"**{wait:.2f}**" if wait > limit else f"{wait:.2f}" for wait in waits]
    lost = str(outcome.lost) if outcome.lost else "-"
    return f"| {fault.name} | {' | '.join(cells)} | {outcome.recovery:.2f} | {lost} |"


def main() -> None:
    """Print the table, and write it into the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deadline", type=float, default=0.5)
    parser.add_argument("--store", choices=STORES)
    parser.add_argument("--fault", default="")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    logging.getLogger("lmcache_core").setLevel(logging.CRITICAL)
    lines, limit = [], options.deadline + 0.05
    for name, (open_store, faults) in STORES.items():
        if options.store not in (None, name):
            continue
        lines += ["", f"## {name}", "", f"| the store | {' | '.join(CALLS)} | back after | lost |"]
        lines += ["|---|" + "--:|" * (len(CALLS) + 2)]
        print("\n".join(lines[-4:]), flush=True)
        with tempfile.TemporaryDirectory() as folder, open_store(Path(folder)) as store:
            for fault in faults:
                if options.fault in fault.name:
                    outcome = tried(store, fault, options.deadline, options.rounds)
                    assert not outcome.wrong, f"{outcome.wrong} wrong chunks"
                    lines.append(row(fault, outcome, limit))
                    print(lines[-1], flush=True)
    if options.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text("\n".join([f"{before}{BEGIN}", *lines, "", END + rest.split(END)[1]]))


if __name__ == "__main__":
    main()
