"""What it takes to know a model's weights by all their bytes: the rate, and vLLM's start-up.

    python benchmarks/bench_weights.py [--gib 2] [--rounds 5] [--vllm PYTHON]

The rate is that of `tensor_digests` over tensors in memory, beside that of a sum over the same
bytes, which does nothing but read them. What larger models take is arithmetic on it: bytes divided
by the rate, on each worker of as many as share the weights. `--vllm` starts SmolLM2-135M in real
vLLM with our connector and shows what vLLM says of loading and what we say of reading; on a CPU
without what is read while oneDNN packs it, which is part of vLLM's loading.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_tiers import console, machine
from rich.table import Table

from lmcache_core.connector import tensor_digests

ROOT = Path(__file__).parents[1]
PIECE = 64 << 20
MODELS = {"Llama-3-8B in bf16": 16.06e9, "Llama-3-70B in bf16": 141.1e9, "SmolLM2-135M": 0.269e9}
"""Bytes of weights."""
START = """
import sys, json
from vllm import LLM
llm = LLM(model=sys.argv[1], enforce_eager=True, max_model_len=1024, dtype="bfloat16",
          skip_tokenizer_init=True, kv_cache_memory_bytes=64 << 20,
          kv_transfer_config=json.loads(sys.argv[2]))
llm.collective_rpc("check_health")  # anything: the next request asks again
llm.generate([{"prompt_token_ids": [1] * 40}], use_tqdm=False)
"""


def seconds(work: Callable[[], object]) -> float:
    """Of one run."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def rates(gib: float, rounds: int) -> tuple[float, float]:
    """Bytes a second, hashed and only read; medians of rounds that take turns."""
    pieces = [torch.randint(-9, 9, (PIECE // 8,)) for _ in range(max(1, int(gib * 16)))]
    total = sum(piece.nbytes for piece in pieces)
    hashed, read = [], []
    for _ in range(rounds):
        hashed.append(seconds(lambda: tensor_digests(pieces)))
        read.append(seconds(lambda: [piece.sum() for piece in pieces]))
    return total / statistics.median(hashed), total / statistics.median(read)


def start_of_vllm(python: str) -> None:
    """Print vLLM's lines of loading and ours of reading."""
    sys.path.insert(0, str(ROOT / "examples"))
    import smollm2

    smollm2.load()
    tier = {"backend": "local_cpu", "capacity": "64MiB"}
    transfer = {
        "kv_connector": "LmcacheCoreConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"tiers": [tier]},
    }
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"}
    command = [python, "-c", START, str(smollm2.UNPACKED), json.dumps(transfer)]
    run = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True)
    for line in (run.stdout + run.stderr).splitlines():
        if "oading weights took" in line or "Model loading took" in line or "has read" in line:
            console.print(line.partition("]")[2].strip() or line, highlight=False)


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vllm", help="a Python that has vLLM beside this project")
    options = parser.parse_args()
    hashed, read = rates(options.gib, options.rounds)
    threads = torch.get_num_threads()
    table = Table(title=f"Weights by all their bytes, {threads} threads; {machine()}")
    for column in ("what", "bytes", "workers", "seconds"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, nbytes in MODELS.items():
        for workers in (1, 8) if nbytes > 1e9 else (1,):
            share = nbytes / workers
            table.add_row(name, f"{nbytes / 1e9:.2f} GB", str(workers), f"{share / hashed:.2f}")
    console.print(table)
    console.print(
        f"hashed {hashed / 1e9:.1f} GB/s, only read {read / 1e9:.1f} GB/s", highlight=False
    )
    if options.vllm:
        start_of_vllm(options.vllm)


if __name__ == "__main__":
    main()
