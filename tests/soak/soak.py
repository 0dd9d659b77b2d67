"""Real stores, processes that use them, and what goes wrong meanwhile, by chance.

Each tier list has two processes: one that is killed again and again, and one that lives as long as
the soak, whose memory, threads and descriptors are watched.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from lmcache_core.testing.processes import forked_early
from tests.backends.reliability import MEMORY, NETWORK, STORES, Fault, Store
from tests.soak.worker import Count, Counts, run

DEADLINE = 0.3
START_SECONDS = 120.0
END_SECONDS = 90.0
"""How long a worker may take to end, with all that its engine promised to write."""
SAMPLE_SECONDS = 5.0
SETTLED_SECONDS = 120.0
"""How long a soak has to be for its memory to be judged."""
MORE = {"MiB": 24, "threads": 12, "descriptors": 12}
"""How much more the last quarter may use than the second, in the mean."""

MEMORY_TIER = {"backend": "local_cpu", "capacity": "256KiB"}
"""Room for a third of all chunks."""
WORLDS: dict[str, list[Any]] = {
    "local_cpu, disk": [MEMORY_TIER, "disk"],
    "shm, redis": ["shm", "redis"],
    "shm, local_cpu, memcached": ["shm", MEMORY_TIER, "memcached"],
    "local_cpu, s3": [MEMORY_TIER, "s3"],
    "disk, redis": ["disk", "redis"],
}
SERDES = {"disk": ["byteplane", "zstd"], "redis": ["zstd"], "memcached": [], "s3": ["safetensors"]}


def _files(store: Store) -> list[Path]:
    chunks = Path(store.tier["path"], "chunks")
    return [file for file in chunks.rglob("*") if len(file.name) == 64 and file.is_file()]


def _damage(store: Store) -> None:
    """One bit of a few chunks."""
    for file in random.sample(files := _files(store), min(3, len(files))):
        with contextlib.suppress(OSError), file.open("r+b") as opened:
            data = opened.read()
            at = random.randrange(len(data))
            opened.seek(at)
            opened.write(bytes([data[at] ^ 1 << random.randrange(8)]))


def _cut(store: Store) -> None:
    for file in random.sample(files := _files(store), min(3, len(files))):
        with contextlib.suppress(OSError), file.open("r+b") as opened:
            opened.truncate(random.randrange(200))


def _empty(store: Store) -> None:
    """rm -rf path/*"""
    for each in Path(store.tier["path"]).glob("*"):
        shutil.rmtree(each, ignore_errors=True)


def _hold_pool(store: Store) -> None:
    """Its lock is held by a process that stopped."""
    if store.lock is not None and store.lock.exists():
        MEMORY[0].begin(store)


def _remove_pool(store: Store) -> None:
    assert store.lock is not None
    store.lock.unlink(missing_ok=True)


FAULTS: dict[str, Sequence[Fault]] = {
    **dict.fromkeys(("redis", "memcached", "s3"), NETWORK),
    "disk": [Fault("is damaged", _damage), Fault("is cut", _cut), Fault("is emptied", _empty)],
    "shm": [Fault("is held", _hold_pool), Fault("is removed", _remove_pool)],
}


class Sample(NamedTuple):
    """What a process uses."""

    mib: float
    threads: int
    descriptors: int


def _sample(pid: int) -> Sample:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"]), descriptors)


@dataclass
class World:
    """A list of tiers, and the processes that use it."""

    name: str
    tiers: list[dict[str, Any]]
    counts: list[Counts] = field(default_factory=list)
    workers: list[BaseProcess] = field(default_factory=list)
    """The one that lives, and the one that is killed."""
    kills: int = 0
    samples: list[Sample] = field(default_factory=list)

    def total(self, count: Count) -> int:
        """Of all processes there were."""
        return sum(counts[count] for counts in self.counts)

    def quarters(self) -> list[Sample]:
        """What the process that lives used in the second quarter of its samples and in the last."""
        step = max(1, len(self.samples) // 4)
        parts = self.samples[step : 2 * step] or self.samples, self.samples[-step:]
        return [Sample(*map(statistics.fmean, zip(*part, strict=True))) for part in parts]


@dataclass
class Report:
    """What came of a soak."""

    worlds: list[World]
    seconds: float
    faults: dict[str, int]
    """How often each store had one."""
    trouble: list[str]
    """What must not be, in words."""

    def total(self, count: Count) -> int:
        """Of all worlds."""
        return sum(world.total(count) for world in self.worlds)

    def table(self) -> str:
        """For people."""
        lines = [
            f"{'tiers':<27}{'loads':>10}{'wrong':>7}{'raised':>8}{'kills':>7}{'forks':>7}"
            f"{'closes':>8}{'interrupts':>12}   MiB, threads, descriptors"
        ]
        for world in self.worlds:
            numbers = [world.total(count) for count in (Count.LOADS, Count.WRONG, Count.RAISED)]
            forks, closes = world.total(Count.FORKS), world.total(Count.CLOSES)
            before, after = (
                f"{s.mib:.0f}, {s.threads:.0f}, {s.descriptors:.0f}" for s in world.quarters()
            )
            lines.append(
                f"{world.name:<27}{numbers[0]:>10,}{numbers[1]:>7}{numbers[2]:>8}"
                f"{world.kills:>7}{forks:>7}{closes:>8}{world.total(Count.INTERRUPTS):>12}"
                f"   {before} -> {after}"
            )
        faults = ", ".join(f"{name} {n}" for name, n in self.faults.items())
        return "\n".join([*lines, f"faults in {self.seconds:.0f} s: {faults}", *self.trouble])


def soak(
    seconds: float,
    loads: int,
    seed: int,
    names: Sequence[str] = tuple(WORLDS),
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Until `loads` chunks were compared, for at most so many seconds."""
    chance = random.Random(seed)
    random.seed(seed)
    with tempfile.TemporaryDirectory(prefix="soak") as folder, contextlib.ExitStack() as stack:
        wanted = {each for name in names for each in WORLDS[name] if isinstance(each, str)}
        stores = {
            name: stack.enter_context(STORES[name][0](_made(Path(folder, name))))
            for name in sorted(wanted)
        }
        worlds = [World(name, [_tier(each, stores) for each in WORLDS[name]]) for name in names]
        soaking = _Soaking(worlds, stores, chance, Path(folder), tell)
        stack.callback(soaking.close)
        soaking.run(seconds, loads)
        return soaking.report()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _tier(which: str | dict[str, Any], stores: dict[str, Store]) -> dict[str, Any]:
    if isinstance(which, dict):
        return which
    tier = stores[which].tier  # whose deadline the faults go by
    tier |= {"deadline": DEADLINE, "serde": SERDES.get(which, [])}
    if which in ("disk", "shm"):
        tier["capacity"] = "2MiB"
    return tier


class _Soaking:
    def __init__(
        self,
        worlds: list[World],
        stores: dict[str, Store],
        chance: random.Random,
        folder: Path,
        tell: Callable[[str], None],
    ) -> None:
        self._worlds, self._stores, self._chance = worlds, stores, chance
        self._folder, self._tell = folder, tell
        self._processes = forked_early()
        self._faults = dict.fromkeys(stores, 0)
        self._began = time.monotonic()
        self._trouble: list[str] = []

    def run(self, seconds: float, loads: int) -> None:
        for world in self._worlds:
            world.workers = [self._start(world), self._start(world)]
        self._wait_until_all_load()
        told = sampled = self._began = time.monotonic()
        for _ in self._events(seconds):
            now = time.monotonic()
            if now - sampled >= SAMPLE_SECONDS:
                sampled = now
                self._sample()
            if now - told >= SAMPLE_SECONDS:
                told = now
                self._tell(self._progress())
            if self._total(Count.LOADS) >= loads:
                break
        else:
            if self._total(Count.LOADS) < loads < 1 << 60:
                self._trouble.append(f"{self._total(Count.LOADS):,} of {loads:,} loads in time")
        self._sample()
        self._end()

    def _wait_until_all_load(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if all(each[Count.LOADS] for world in self._worlds for each in world.counts):
                return
            time.sleep(0.05)
        raise RuntimeError(f"a worker has loaded nothing after {START_SECONDS} s")

    def _events(self, seconds: float) -> Iterator[None]:
        """A fault or a death each time."""
        while time.monotonic() - self._began < seconds:
            yield
            name = self._chance.choice(list(self._stores))
            fault = self._chance.choice(FAULTS[name])
            self._faults[name] += 1
            fault.begin(self._stores[name])
            time.sleep(self._chance.uniform(0.05, 0.5))
            self._stores[name].heal()
            if self._chance.random() < 0.3:
                self._kill_one(self._chance.choice(self._worlds))
            time.sleep(self._chance.uniform(0.1, 1.0))

    def _start(self, world: World) -> BaseProcess:
        counts = Counts(self._folder / f"{world.name}-{len(world.counts)}.counts")
        world.counts.append(counts)
        arguments = world.tiers, self._chance.randrange(1 << 30), counts.path
        worker = self._processes.Process(target=run, args=arguments)
        worker.start()
        return worker

    def _kill_one(self, world: World) -> None:
        victim = world.workers.pop()
        if victim.exitcode is not None:
            self._trouble.append(f"{world.name}: a worker ended by itself: {victim.exitcode}")
        victim.kill()
        victim.join()
        victim.close()
        world.kills += 1
        world.workers.append(self._start(world))

    def _sample(self) -> None:
        for world in self._worlds:
            worker = world.workers[0]
            if worker.is_alive() and worker.pid is not None:
                world.samples.append(_sample(worker.pid))

    def _progress(self) -> str:
        loads, wrong, raised = map(self._total, (Count.LOADS, Count.WRONG, Count.RAISED))
        kills, faults = sum(world.kills for world in self._worlds), sum(self._faults.values())
        return (
            f"[{time.monotonic() - self._began:5.0f} s] {loads:>9,} loads, {wrong} wrong, "
            f"{raised} raised; {kills} kills, {faults} faults, "
            f"{self._total(Count.FORKS)} forks, {self._total(Count.INTERRUPTS)} interrupts"
        )

    def _total(self, count: Count) -> int:
        return sum(world.total(count) for world in self._worlds)

    def _end(self) -> None:
        """Have the workers that are left end, with nothing left behind."""
        for world in self._worlds:
            for counts in world.counts[-len(world.workers) :] + world.counts[:1]:
                counts.add(Count.STOP)
        end = time.monotonic() + END_SECONDS
        for world in self._worlds:
            for worker in world.workers:
                worker.join(max(0.0, end - time.monotonic()))
                if worker.exitcode != 0:
                    self._trouble.append(f"{world.name}: a worker ended with {worker.exitcode}")

    def close(self) -> None:
        for world in self._worlds:
            for worker in world.workers:
                worker.kill()
                worker.join()
                worker.close()
            for counts in world.counts:
                counts.close()

    def report(self) -> Report:
        seconds = time.monotonic() - self._began
        for world in self._worlds:
            wrong, raised = world.total(Count.WRONG), world.total(Count.RAISED)
            if wrong or raised:
                self._trouble.append(f"{world.name}: {wrong} wrong, {raised} raised")
            if not world.total(Count.LOADS):
                self._trouble.append(f"{world.name}: nothing was loaded")
            if seconds >= SETTLED_SECONDS:
                before, after = world.quarters()
                for (what, more), old, new in zip(MORE.items(), before, after, strict=True):
                    if new > old + more:
                        self._trouble.append(f"{world.name}: {old:.0f} -> {new:.0f} {what}")
        for file in self._folder.glob("*.errors"):
            self._trouble.append(f"{file.stem}:\n{file.read_text()[-4000:]}")
        return Report(self._worlds, seconds, self._faults, self._trouble)
