"""What identity costs a call of Transformers' generate on SmolLM2-135M, beside one decode step.

    python benchmarks/bench_identity.py [--seconds 80]

For each of bfloat16 and float32, in rounds until the seconds are over:

    a decode step          one forward pass of one token, 512 tokens before it
    identity               observing the model once: its guards, and all bytes of its weights
    its guards             whether all that the walk met is where it was
    the walk               where a guard does not hold
    TTFT, without us       of a prompt of 512 tokens
    TTFT, nothing stored   the same attached; who comes first alternates

A call observes once, and once more where it stores something new: then it has computed at least a
chunk. Ratios are medians of the rounds' ratios, so that what else the machine does counts for
both. What one attach costs, with its trial, is printed beside it.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
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
PARTS = 5
"""What is timed of the parts in a round of which a prefill takes most."""
STEP, IDENTITY, GUARDS, WALK = "a decode step", "identity", "its guards", "the walk"
PLAIN, MISSED = "TTFT, without us", "TTFT, nothing stored"
Round = dict[str, float]
console = Console()


def seconds(what: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def prompt() -> torch.Tensor:
    """Tokens that no prompt had before."""
    return torch.randint(1000, 40000, (1, TOKENS))


def parts(model: Any, observer: Observer, walk: Walk, cache: DynamicCache) -> Round:
    """Seconds of what identity is made of, beside a decode step."""
    token = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        step = seconds(lambda: model(input_ids=token, cache=cache, use_cache=True))
    cache.crop(-1)
    return {
        STEP: step,
        IDENTITY: seconds(observer.identity),
        GUARDS: seconds(walk.guards.hold),
        WALK: seconds(lambda: Walk(model)),
    }


def first_tokens(model: Any, turn: int) -> Round:
    """Seconds to the first token of an attached model, and without us."""
    plain = types.SimpleNamespace(generate=functools.partial(type(model).generate, model))
    both = [(PLAIN, plain), (MISSED, model)]
    return {kind: ttft(each, prompt()) for kind, each in (both, both[::-1])[turn % 2]}


def rounds(model: Any, limit: float) -> Iterator[Round]:
    """Rounds until the seconds are over; each part's median in a round."""
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prompt(), cache=filled, use_cache=True)
    observer, walk = Observer(model), Walk(model)
    end = time.monotonic() + limit
    turn = 0
    while turn < 4 or time.monotonic() < end:  # two that warm up, and two
        some = [parts(model, observer, walk, filled) for _ in range(PARTS)]
        median = {kind: statistics.median(each[kind] for each in some) for kind in some[0]}
        found = {**median, **first_tokens(model, turn)}
        if turn > 1:
            yield found
        turn += 1


def measured(name: str, limit: float) -> tuple[float, list[Round]]:
    """Seconds that attach takes, and rounds with the model in one dtype."""
    model, _ = smollm2.load(getattr(torch, name))
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    with lmcache_core.open({"tiers": [{"backend": "local_cpu", "capacity": "1GiB"}]}) as cache:
        attach(model, cache).detach()  # what only the first one costs: imports, torch's threads
        once = seconds(lambda: attach(model, cache))
        return once, list(rounds(model, limit))


def report(name: str, once: float, found: list[Round]) -> None:
    """Print a table and what it comes to."""
    table = Table(title=f"SmolLM2-135M, {name}; {machine()}; {len(found)} rounds")
    for column in ("", "median", "of a decode step"):
        table.add_column(column, justify="left" if not column else "right")

    def of(kind: str, other: str) -> float:
        return statistics.median(each[kind] / each[other] for each in found)

    for kind in (STEP, IDENTITY, GUARDS, WALK, PLAIN, MISSED):
        median = statistics.median(each[kind] for each in found)
        table.add_row(kind, f"{median * 1e3:.1f} ms", f"{of(kind, STEP):.2f}")
    table.add_row("attach", f"{once * 1e3:.1f} ms", "")
    console.print(table)
    console.print(f"identity of a call: {of(IDENTITY, STEP):.2f} of a decode step")
    added, share = of(MISSED, PLAIN) - 1, of(IDENTITY, PLAIN)
    console.print(f"TTFT added where nothing hits: {added:+.1%}; identity is {share:.1%} of it all")


def main() -> None:
    """Print a table for each dtype."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=80, help="of rounds, for each dtype")
    options = parser.parse_args()
    for name in ("bfloat16", "float32"):
        with console.status(f"SmolLM2-135M in {name} ..."):
            once, found = measured(name, options.seconds)
        report(name, once, found)


if __name__ == "__main__":
    main()
