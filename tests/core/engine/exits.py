"""Processes that end in the middle of loads and stores: python exits.py FOLDER COUNT KINDS

In a process of its own, which has loaded nothing else that the end of a child of it could trip
over."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lmcache_core
from lmcache_core import ChunkKey, KVLayout, LayerGroup, Namespace, Tensors, unverified

TOKENS, CHUNKS = 64, 12
LAYOUT = KVLayout(
    groups=(
        LayerGroup(
            kind="attention", layers=range(8), kv_heads=4, key_dim=64, value_dim=64, dtype="float32"
        ),
    )
)  # 1 MiB a chunk, which takes a while to decode
NAMESPACE = Namespace(model="m", layout=LAYOUT, weights=unverified("w"))
"""Made once, as engines do: pydantic is Rust, which the end of a thread must not unwind either."""


def exit_status(work: Callable[[], object], seconds: float) -> int:
    """Of a process that begins `work` and ends, as a program does, after some seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        work()
        time.sleep(seconds)
        ctypes.pythonapi.Py_Exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Program:
    """Loads and stores on daemon threads, for as long as it runs."""

    def __init__(self, tiers: list[dict[str, Any]]) -> None:
        self._config = {"chunk_size": TOKENS, "tiers": tiers}

    def store(self, cache: lmcache_core.CacheEngine, first: int) -> None:
        def gather(index: int, out: Tensors) -> None:
            for tensor in out.values():
                tensor.copy_(torch.full_like(tensor, index))

        cache.store(NAMESPACE, self._keys(first), gather)

    def load(self, cache: lmcache_core.CacheEngine, first: int) -> int:
        return sum(1 for _ in cache.load(self._keys(first)))

    def _keys(self, first: int) -> list[ChunkKey]:
        return NAMESPACE.keys([first, *range(1, TOKENS * CHUNKS)], TOKENS)

    def fill(self) -> None:
        with lmcache_core.open(self._config) as cache:
            self.store(cache, 0)

    def start(self) -> None:
        self._cache = lmcache_core.open(self._config)  # nobody closes it
        for work in (self.load, self.load, self.store):
            threading.Thread(target=self._again, args=(work,), daemon=True).start()

    def _again(self, work: Callable[[Any, int], object]) -> None:
        for turn in range(1000):
            work(self._cache, 0 if work == self.load else turn)


def ends(folder: Path, exits: int, kinds: int) -> None:
    disk = {"backend": "disk", "path": str(folder), "capacity": "64MiB", "queue": "8MiB"}
    memory = {"backend": "local_cpu", "capacity": "4MiB"}
    programs = [
        Program([{**disk, "serde": ["int8"]}]),
        Program([memory, {**disk, "serde": ["byteplane", "zstd"]}]),
    ]
    chance = random.Random(1)
    for number in range(exits):
        program = programs[number % kinds]
        if number < kinds:
            program.fill()
        status = exit_status(program.start, chance.uniform(0.01, 0.1))
        assert status == 0, f"exit {number}: {status}"


if __name__ == "__main__":
    faulthandler.enable()
    ends(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
