"""Another process that shares a pool, up before there is anything: python shm_worker.py POOL PROMPT

Waits for a line on its standard input, then prints as JSON what it generated and how many chunks
came from where. It also counts the tensors that were loaded, how many of them lie in the pool's own
pages, and the buffers that were read into.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import smollm2

import lmcache_core
from lmcache_connectors.transformers import attach
from lmcache_core.backend import Transfer


def main() -> None:
    pool, prompt = sys.argv[1:]
    model, _ = smollm2.load(torch.float32)
    shm = {"backend": "shm", "pool": pool, "capacity": "256MiB"}
    counts = {"tensors": 0, "shared": 0, "buffers": 0}
    with lmcache_core.open({"tiers": [shm], "chunk_size": 32}) as cache, attach(model, cache):
        watch(cache, counts)
        print("ready", flush=True)
        sys.stdin.readline()
        ids = torch.tensor(json.loads(Path(prompt).read_text()))
        output = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=2)
        loaded = {event[1]: n for event, n in cache.stats().items() if event[0] == "loaded"}
    print(json.dumps({"output": output.tolist(), "loaded": loaded, **counts}))


def watch(cache: lmcache_core.CacheEngine, counts: dict[str, int]) -> None:
    """Count what `load` yields and the buffers that it asks for."""
    whole = cache._tiers[0]._backend._pool._segment.whole
    load, allocate = cache.load, Transfer.allocate

    def watched(what: Any, **options: Any) -> Iterator[lmcache_core.Chunk]:
        for chunk in load(what, **options):
            for tensor in chunk.tensors.values():
                counts["tensors"] += 1
                counts["shared"] += 0 <= tensor.data_ptr() - whole.ctypes.data < whole.nbytes
            yield chunk

    def counted(transfer: Transfer, nbytes: int) -> memoryview:
        counts["buffers"] += 1
        return allocate(transfer, nbytes)

    cache.load = watched
    Transfer.allocate = counted


if __name__ == "__main__":
    main()
