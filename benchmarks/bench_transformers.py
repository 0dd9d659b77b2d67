"""Time to first token of Transformers' generate on SmolLM2-135M, with and without the cache.

    python benchmarks/bench_transformers.py [--tokens 4096] [--rounds 5]

In each round the same prompt (a document and a question of 24 tokens that is new each time) is
timed by:

    plain    without the cache
    miss     attached, prompt never seen: what a useless lookup costs
    memory   attached, the document's KV in local_cpu
    disk     attached, the document's KV on disk only (page cache)
    limit    without the cache, the document's KV in a DynamicCache that was copied before: what
             computing the question alone costs

Ratios are medians of the rounds' ratios. Only what comes before the first token is timed, not the
storing after it. memory and disk are second hits: the first one touches memory that is new to the
process, which a server does once.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_tiers import machine
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import lmcache_core
from lmcache_connectors.transformers import attach

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import smollm2

QUESTION = 24
CHUNK = 32
KINDS = ("plain", "miss", "memory", "disk", "limit")
console = Console()


class FirstToken(BaseStreamer):
    """Seconds from its making to the first token."""

    def __init__(self) -> None:
        self._puts = 0
        self.seconds = 0.0
        self._began = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each token."""
        self._puts += 1
        if self._puts == 2:
            self.seconds = time.perf_counter() - self._began

    def end(self) -> None:
        """Nothing."""


def ttft(model: Any, prompt: torch.Tensor, own: DynamicCache | None = None) -> float:
    """Seconds to the first token of a prompt, whose beginning may be in a cache of its own."""
    more = {} if own is None else {"cache": own}
    streamer = FirstToken()
    model.generate(prompt, max_new_tokens=1, do_sample=False, streamer=streamer, **more)
    return streamer.seconds


def with_question(document: torch.Tensor) -> torch.Tensor:
    """The document and tokens that no earlier prompt had behind it."""
    return torch.cat([document, torch.randint(1000, 40000, (1, QUESTION))], dim=1)


def one_round(model: Any, document: torch.Tensor, folder: Path) -> dict[str, float]:
    """Seconds by kind."""
    memory = {"backend": "local_cpu", "capacity": "4GiB"}
    disk = {"backend": "disk", "path": str(folder), "capacity": "8GiB"}
    seconds = {"plain": ttft(model, with_question(document))}
    with lmcache_core.open({"chunk_size": CHUNK, "tiers": [memory, disk]}) as cache:
        with attach(model, cache):
            seconds["miss"] = ttft(model, with_question(document.flip(1)))
            for _ in range(3):
                seconds["memory"] = ttft(model, with_question(document))
        cache.flush()
    with lmcache_core.open({"chunk_size": CHUNK, "tiers": [disk]}) as cache:
        with attach(model, cache) as attached:
            for _ in range(2):
                seconds["disk"] = ttft(model, with_question(document))
            prompt = with_question(document)
            own, _ = attached.load_prefix(prompt)
        seconds["limit"] = ttft(model, prompt, copy.deepcopy(own))
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    with console.status("Loading SmolLM2-135M-Instruct ..."):
        model, tokenizer = smollm2.load(getattr(torch, options.dtype))
        model.generation_config.pad_token_id = model.generation_config.eos_token_id
        text = smollm2.document(tokenizer, options.tokens + 100)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        document = ids[:, : options.tokens - QUESTION]
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.rounds + 1):
            with console.status(f"Round {number} of {options.rounds} ..."):
                rounds.append(one_round(model, document, Path(name) / str(number)))
    rounds = rounds[1:]  # the first warms up
    table = Table(title=f"{options.tokens:,} tokens, {options.dtype}; {machine()}")
    for column in ("KV from", "TTFT", "of plain", "saved"):
        table.add_column(column, justify="left" if column == "KV from" else "right")
    for kind in KINDS:
        seconds = statistics.median(r[kind] for r in rounds)
        ratio = statistics.median(r[kind] / r["plain"] for r in rounds)
        saved = f"{1 - ratio:.1%}" if kind != "plain" else ""
        table.add_row(kind, f"{seconds:.3f} s", f"{ratio:.1%}", saved)
    console.print(table)


if __name__ == "__main__":
    main()
