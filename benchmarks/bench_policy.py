"""Hits of the eviction policies on traces: docs/policies.md.

    python benchmarks/bench_policy.py conversation.jsonl synthetic.jsonl [--write] [--engine]

Traces as lmcache_core/policy/traces.py reads them, such as Mooncake's
(https://github.com/kvcache-ai/Mooncake, FAST25-release/traces). Capacities are parts of the
distinct chunks. `--engine`: each trace through a real engine with local_cpu, too, whose hits have
to be the simulator's, request by request.
"""

from __future__ import annotations

import argparse
import heapq
import random
import time
from pathlib import Path

import matplotlib.pyplot as plt

import lmcache_core
from lmcache_core import ChunkKey, KVLayout, LayerGroup, unverified
from lmcache_core.connector import known
from lmcache_core.policy import traces
from lmcache_core.policy.named import eviction_policy
from lmcache_core.policy.simulator import Simulator

DOCS = Path(__file__).parent.parent / "docs"
PARTS = (0.003, 0.01, 0.03, 0.1, 0.3)
BEGIN, END = "<!-- bench-policy -->", "<!-- /bench-policy -->"
Trace = list[list[ChunkKey]]


def main() -> None:
    """Replay, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="docs/policies.md and its picture")
    parser.add_argument("--engine", action="store_true", help="compare with a real engine")
    arguments = parser.parse_args()
    pages, curves = [], {}
    for path in arguments.traces:
        trace = list(traces.read(path))
        name = path.stem.removeprefix("mooncake_")
        rows = table(trace)
        curves[name] = rows
        pages.append(text(name, trace, rows))
        print(pages[-1], flush=True)
        if arguments.engine:
            for policy in known("eviction"):
                compare(trace, policy)
    if arguments.write:
        path = DOCS / "policies.md"
        head, _, rest = path.read_text().partition(BEGIN)
        path.write_text(
            head + BEGIN + "\n\n" + "\n".join(pages) + "\n" + END + rest.partition(END)[2]
        )
        draw(curves)


def table(trace: Trace) -> dict[str, list[float]]:
    """Per cent of the chunks that were found, for each policy and capacity."""
    distinct = len({key for sequence in trace for key in sequence})
    capacities = [max(2, round(part * distinct)) for part in PARTS]
    rows = {}
    for name in (*known("eviction"), "Belady"):
        began, rates = time.process_time(), []
        for capacity in capacities:
            limit = name == "Belady"
            rates.append(belady(trace, capacity) if limit else replay(trace, name, capacity))
        seconds = time.process_time() - began
        chunks = len(PARTS) * sum(map(len, trace))
        print(f"{name}: {1e6 * seconds / chunks:.1f} us of CPU a chunk", flush=True)
        rows[name] = [100 * rate for rate in rates]
    for share, name in ((0.5, "auto, half of the ends told"), (1.0, "auto, all ends told")):
        rates = [hinted(trace, "auto", capacity, share) for capacity in capacities]
        rows[name] = [100 * rate for rate in rates]
    return rows


def replay(trace: Trace, name: str, capacity: int) -> float:
    """The part of the chunks that a policy's store had."""
    store = Simulator(capacity, eviction_policy(name, capacity))
    for sequence in trace:
        store.request(sequence)
    return store.outcome.hit_rate


def hinted(trace: Trace, name: str, capacity: int, share: float) -> float:
    """As `replay`, where `share` of the requests whose chat is over say so."""
    store, chance = Simulator(capacity, eviction_policy(name, capacity)), random.Random(1)
    for sequence, over in zip(trace, ends(trace), strict=True):
        store.request(sequence)
        if over and chance.random() < share:
            store.hint(sequence, "done")
    return store.outcome.hit_rate


def ends(trace: Trace) -> list[bool]:
    """Whether no later request goes on from each: has all of it but its last, unfinished chunk."""
    over: list[bool] = [True] * len(trace)
    latest: dict[ChunkKey, int] = {}
    for number, sequence in enumerate(trace):
        before = next((latest[key] for key in reversed(sequence) if key in latest), None)
        if before is not None:
            over[before] = False
        latest |= dict.fromkeys(sequence[-2:], number)
    return over


def belady(trace: Trace, capacity: int) -> float:
    """The limit: what is needed again last leaves, or does not come in at all."""
    never = len(trace)
    following: dict[ChunkKey, int] = {}
    nexts: list[list[int]] = []
    for number in range(len(trace) - 1, -1, -1):
        nexts.append([following.get(key, never) for key in trace[number]])
        following.update(dict.fromkeys(trace[number], number))
    stored: dict[ChunkKey, int] = {}
    order: list[tuple[int, ChunkKey]] = []
    hits = 0
    for sequence, again in zip(trace, reversed(nexts), strict=True):
        hits += next((n for n, key in enumerate(sequence) if key not in stored), len(sequence))
        for key, when in zip(sequence, again, strict=True):
            stored[key] = when
            heapq.heappush(order, (-when, key))
        while len(stored) > capacity:
            when, key = heapq.heappop(order)
            if stored.get(key) == -when:
                del stored[key]
    return hits / sum(map(len, trace))


def frame_bytes(layout: KVLayout) -> int:
    """Bytes of a frame of one token in memory: the least capacity that holds one."""
    tier = {"backend": "local_cpu", "eviction": "lru"}
    low, high = 1, 1 << 20
    while low < high:
        middle = (low + high) // 2
        config = {"chunk_size": 1, "tiers": [tier | {"capacity": middle}]}
        with lmcache_core.open(config) as cache:
            namespace = cache.namespace(model="m", layout=layout, weights=unverified("test"))
            keys = cache.keys(namespace, [1])
            stored = cache.store(
                namespace, keys, lambda index, out: [t.zero_() for t in out.values()]
            )
        low, high = (low, middle) if stored else (middle + 1, high)
    return low


def compare(trace: Trace, policy: str) -> None:
    """A trace through an engine and through the simulator."""
    group = LayerGroup(
        kind="attention", layers=(0,), kv_heads=1, key_dim=1, value_dim=1, dtype="float16"
    )
    layout = KVLayout(groups=(group,))
    distinct = len({key for sequence in trace for key in sequence})
    frame = frame_bytes(layout)
    for part in (0.01, 0.1):
        capacity = round(part * distinct) * frame
        tier = {"backend": "local_cpu", "capacity": capacity, "eviction": policy}
        simulator = Simulator(capacity, eviction_policy(policy, capacity), frame)
        differ = 0
        with lmcache_core.open({"chunk_size": 1, "tiers": [tier]}) as cache:
            namespace = cache.namespace(model="m", layout=layout, weights=unverified("test"))
            for sequence in trace:
                keys = namespace.keys_from_hashes(sequence)
                hits = sum(1 for _ in cache.load(cache.lookup(keys)))
                cache.store(namespace, keys, lambda index, out: [t.zero_() for t in out.values()])
                differ += simulator.request(keys) != hits
        rate = 100 * simulator.outcome.hit_rate
        print(f"{policy} at {part:.0%}: {differ} of {len(trace)} requests differ ({rate:.2f} %)")


def text(name: str, trace: Trace, rows: dict[str, list[float]]) -> str:
    """A trace's table, as Markdown."""
    chunks = sum(map(len, trace))
    distinct = len({key for sequence in trace for key in sequence})
    lines = [
        f"**{name}**: {len(trace):,} requests, {chunks:,} chunks, {distinct:,} of them distinct.",
        "",
        "| hits, % of chunks | " + " | ".join(f"{100 * part:g} %" for part in PARTS) + " |",
        "|---|" + "--:|" * len(PARTS),
    ]
    for policy, rates in rows.items():
        lines.append(f"| {policy} | " + " | ".join(f"{rate:.2f}" for rate in rates) + " |")
    return "\n".join(lines) + "\n"


def draw(curves: dict[str, dict[str, list[float]]]) -> None:
    """The tables as a picture."""
    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.6), squeeze=False)
    for axis, (name, rows) in zip(axes[0], curves.items(), strict=True):
        for policy, rates in rows.items():
            style = "--" if policy == "Belady" else "-"
            axis.plot([100 * part for part in PARTS], rates, style, marker=".", label=policy)
        axis.set(xscale="log", xlabel="capacity, % of distinct chunks", title=name)
    axes[0][0].set_ylabel("hits, % of chunks")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(DOCS / "policies.png", dpi=110)


if __name__ == "__main__":
    main()
