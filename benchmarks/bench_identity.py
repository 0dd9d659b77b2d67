"""What identity costs a call of Transformers' generate on SmolLM2-135M, beside one decode step.

    python benchmarks/bench_identity.py [--rounds 15]

In each round, in float32 and in bfloat16:

    decode step   one forward pass of one token, 512 tokens before it
    identity      observing the model once: guards, and all bytes of its weights
    TTFT          of a prompt of 512 tokens that nothing is stored of, without us and attached

A call observes once, and once more where it stores something new: then it has computed at least a
chunk. Ratios are medians of the rounds' ratios, so that what else the machine does counts for
both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_tiers import machine
from bench_transformers import ttft
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import lmcache_core
from lmcache_connectors.transformers import attach
from lmcache_connectors.transformers.identity import Observer
from lmcache_connectors.transformers.walk import Walk

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import smollm2

TOKENS = 512
console = Console()


def seconds(what: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def prompt() -> torch.Tensor:
    """Tokens that no prompt had before."""
    return torch.randint(1000, 40000, (1, TOKENS))


def one_round(
    model: Any, attached: Any, observer: Observer, cache: DynamicCache
) -> dict[str, float]:
    """Seconds by kind."""
    walk = Walk(model)
    token = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        step = seconds(lambda: model(input_ids=token, cache=cache, use_cache=True))
    cache.crop(-1)
    return {
        "decode step": step,
        "identity": seconds(observer.identity),
        "its guards": seconds(walk.holds),
        "the walk, where a guard does not hold": seconds(lambda: Walk(model)),
        "TTFT of 512 tokens": ttft(model, prompt()),
        "the same attached, no hit": ttft(attached, prompt()),
    }


def measured(name: str, rounds: int) -> list[dict[str, float]]:
    """Rounds with the model in one dtype; the first warms up."""
    model, _ = smollm2.load(getattr(torch, name))
    other, _ = smollm2.load(getattr(torch, name))
    for each in (model, other):
        each.generation_config.pad_token_id = each.generation_config.eos_token_id
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt(), cache=filled, use_cache=True)
    tier = {"backend": "local_cpu", "capacity": "4GiB"}
    with lmcache_core.open({"tiers": [tier]}) as cache, attach(other, cache):
        observer = Observer(model)
        observer.identity()
        return [one_round(model, other, observer, filled) for _ in range(rounds + 1)][1:]


def main() -> None:
    """Print a table for each dtype."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for name in ("bfloat16", "float32"):
        with console.status(f"SmolLM2-135M in {name} ..."):
            rounds = measured(name, options.rounds)
        table = Table(title=f"SmolLM2-135M, {name}; {machine()}")
        for column in ("", "median", "of a decode step"):
            table.add_column(column, justify="left" if not column else "right")
        for kind in rounds[0]:
            median = statistics.median(each[kind] for each in rounds)
            ratio = statistics.median(each[kind] / each["decode step"] for each in rounds)
            table.add_row(kind, f"{median * 1e3:.1f} ms", f"{ratio:.2f}")
        console.print(table)
        plain, attached = "TTFT of 512 tokens", "the same attached, no hit"
        added = statistics.median(each[attached] / each[plain] - 1 for each in rounds)
        share = statistics.median(each["identity"] / each[plain] for each in rounds)
        console.print(f"TTFT added where nothing hits: {added:+.1%}, {share:.1%} of it identity")


if __name__ == "__main__":
    main()
