"""A process that uses a cache: it stores, loads and compares every byte, and meanwhile is
interrupted, forks, closes, forgets loads and keeps what it was lent."""

from __future__ import annotations

import gc
import itertools
import logging
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lmcache_core
from lmcache_core import Chunk, ChunkKey, KVLayout, LayerGroup, Namespace, Tensors, unverified
from lmcache_core.testing import no_leaks

TOKENS, CHUNKS, PROMPTS = 4, 16, 48
CHILD_SECONDS = 60
"""After these a forked child that hangs is killed, and counted as one that failed."""
LAYOUT = KVLayout(
    groups=(
        LayerGroup(
            kind="attention", layers=(0, 1), kv_heads=1, key_dim=8, value_dim=8, dtype="float32"
        ),
    )
)
NAMESPACE = Namespace(model="soak", layout=LAYOUT, weights=unverified("w"))


class Count(IntEnum):
    """What a worker counts."""

    LOADS = 0  # chunks that were loaded and compared
    WRONG = 1
    RAISED = 2  # out of a call of the engine's
    STORED = 3
    INTERRUPTS = 4
    FORKS = 5
    CLOSES = 6
    STOP = 7  # set by who started it


class Counts:
    """Numbers that a worker and who started it both see, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("a+b") as file:
            file.truncate(8 * len(Count))
            self._numbers = np.frombuffer(mmap.mmap(file.fileno(), 8 * len(Count)), np.int64)

    def __getitem__(self, count: Count) -> int:
        return int(self._numbers[count])

    def close(self) -> None:
        """Keep the numbers, and nothing else."""
        self._numbers = self._numbers.copy()

    def add(self, count: Count, amount: int = 1) -> None:
        """Only one process adds at a time."""
        self._numbers[count] += amount


def run(tiers: list[dict[str, Any]], seed: int, path: Path) -> None:
    """Use a cache until told to stop. What is raised is counted, and written beside the counts."""
    torch.set_num_threads(1)
    logging.getLogger("lmcache_core").setLevel(logging.ERROR)  # faults are expected
    counts = Counts(path)
    user = _User(tiers, seed, counts)
    try:
        with no_leaks():
            user.use()
            del user
            gc.collect()
    except BaseException:
        _note(counts)


def _note(counts: Counts) -> None:
    counts.add(Count.RAISED)
    with counts.path.with_suffix(".errors").open("a") as file:
        traceback.print_exc(file=file)


class _User:
    def __init__(self, tiers: list[dict[str, Any]], seed: int, counts: Counts) -> None:
        self._config = {"chunk_size": TOKENS, "tiers": tiers}
        self._chance, self._counts = random.Random(seed), counts
        self._kept: deque[Chunk] = deque(maxlen=8)
        self._armed = False
        self._cache = lmcache_core.open(self._config)

    def use(self) -> None:
        """Do one thing after the other, each as likely as it is here."""
        acts: dict[Callable[[], None], float] = {
            self._load: 70,
            self._store: 10,
            self._look: 5,
            self._forget: 4,
            self._invalidate: 1,
            self._reopen: 0.15,
            self._fork: 0.15,
        }
        signal.signal(signal.SIGALRM, self._interrupt)
        sys.unraisablehook = lambda failure: None  # what an interrupt ends in a finalizer
        while not self._counts[Count.STOP]:
            (act,) = self._chance.choices(list(acts), list(acts.values()))
            try:
                self._interrupted(act) if self._chance.random() < 0.05 else act()
            except BaseException:
                _note(self._counts)
        self._kept.clear()
        self._cache.close()

    def _interrupt(self, *_: object) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    def _interrupted(self, act: Callable[[], None]) -> None:
        """Ctrl-C, at any moment of an act that is the engine's."""
        if act in (self._reopen, self._fork):
            return act()
        try:
            self._armed = True
            signal.setitimer(signal.ITIMER_REAL, self._chance.uniform(1e-5, 3e-3))
            act()
            self._armed = False
        except KeyboardInterrupt:
            self._counts.add(Count.INTERRUPTS)
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    # Acts

    def _load(self, keys: list[ChunkKey] | None = None) -> None:
        keys = self._keys() if keys is None else keys
        shared, loaded = self._chance.random() < 0.5, 0
        for chunk in self._cache.load(keys, shared=shared):
            self._compare(chunk)
            loaded += 1
            if self._chance.random() < 0.02:
                self._kept.append(chunk)
        if self._kept and self._chance.random() < 0.1:
            self._compare(self._kept.popleft())  # what was lent stays as it was
        if loaded < CHUNKS:
            self._store(keys)

    def _store(self, keys: list[ChunkKey] | None = None) -> None:
        keys = self._keys() if keys is None else keys

        def gather(index: int, out: Tensors) -> None:
            for name, tensor in out.items():
                tensor.view(torch.int32).copy_(_content(keys[index], name, tensor.numel()).view(tensor.shape))  # fmt: skip

        self._counts.add(Count.STORED, self._cache.store(NAMESPACE, keys, gather))

    def _look(self) -> None:
        self._cache.lookup(self._keys())
        self._cache.stats()

    def _forget(self) -> None:
        """A load that is only collected, with a cycle."""
        cycle: list[Any] = [self._cache.load(self._keys())]
        for chunk in itertools.islice(cycle[0], 2):
            self._compare(chunk)
        cycle.append(cycle)

    def _invalidate(self) -> None:
        keys = self._keys()
        self._cache.invalidate(keys[self._chance.randrange(len(keys)) :])

    def _reopen(self) -> None:
        self._counts.add(Count.CLOSES)
        self._cache.close()
        self._cache = lmcache_core.open(self._config)

    def _fork(self) -> None:
        """A worker of a server that has the cache open: it uses it, and ends."""
        self._counts.add(Count.FORKS)
        child = os.fork()
        if child == 0:
            self._be_child()
        end = time.monotonic() + CHILD_SECONDS
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise AssertionError(f"a forked child hangs for {CHILD_SECONDS} s")
            time.sleep(0.001)

    def _be_child(self) -> None:
        try:
            for _ in range(3):
                self._load()
            if self._chance.random() < 0.5:
                self._cache.close()
        except BaseException:
            _note(self._counts)
        finally:
            os._exit(0)

    # What is stored

    def _keys(self) -> list[ChunkKey]:
        prompt = self._chance.randrange(PROMPTS)
        return NAMESPACE.keys([prompt, *range(1, TOKENS * CHUNKS)], TOKENS)

    def _compare(self, chunk: Chunk) -> None:
        for name, tensor in chunk.tensors.items():
            right = _content(chunk.key, name, tensor.numel())
            if not torch.equal(tensor.reshape(-1).view(torch.int32), right):
                self._counts.add(Count.WRONG)
        self._counts.add(Count.LOADS)


def _content(key: ChunkKey, name: str, count: int) -> torch.Tensor:
    """The KV of a chunk, as 32-bit words: other words for each key and tensor."""
    seed = int.from_bytes(key[-4:], "little") ^ len(name) * name.encode()[-1]
    words = (np.arange(count, dtype=np.int64) * 2654435761 + seed) & 0x7FFFFFFF
    return torch.from_numpy(words.astype(np.int32))
