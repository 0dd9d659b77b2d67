"""What each serde saves and what it costs, on real KV: size, speed, quality.

    python benchmarks/bench_serde.py [--documents 8] [--write]

Model: SmolLM2-135M-Instruct in bfloat16. Text: the Python language reference in windows of 2,048
tokens. Of each window the first 1,024 tokens are the prefix: their KV goes through the pipeline,
four chunks of 256 tokens, frame and checksum included. The other 1,024 tokens are scored on top of
it.

    ratio        bytes of KV per byte of frame
    encode, decode   GB/s of KV in bfloat16, one thread, medians
    batch        encoding four chunks as a tier does, on two threads
    perplexity   of the scored tokens, relative to KV that went through no serde
    KL           divergence of the next-token distributions from those, mean, in millinats
    greedy       how often the likeliest token is the same

`--write` puts the table and the plot into docs/ (serdes.md between its markers, serdes.json,
serdes.svg).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_tiers import machine
from rich.console import Console
from rich.progress import track
from transformers import DynamicCache

from lmcache_core import Chunk, KVLayout, LayerGroup, Namespace, unverified
from lmcache_core.backend import DaemonPool, component
from lmcache_core.engine.tier import ENCODERS
from lmcache_core.frames.frame import decode, encode
from lmcache_core.frames.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import smollm2

ROOT = Path(__file__).parents[1]
WEIGHTS = unverified("smollm2")

TOKENS, CHUNK, PREFIX = 2048, 256, 1024
Step = str | tuple[str, dict[str, Any]]
PIPELINES: dict[str, list[Step]] = {
    "raw": ["raw"],
    "zstd": ["zstd"],
    "byteplane": ["byteplane"],
    "byteplane, zstd": ["byteplane", "zstd"],
    "int8": ["int8"],
    "int8, zstd": ["int8", "zstd"],
    "fp8": ["fp8"],
    "fp8, zstd": ["fp8", "zstd"],
    "int4": ["int4"],
    "int4, zstd": ["int4", "zstd"],
    "int4 (group 64), zstd": [("int4", {"group": 64}), "zstd"],
    "int4 (group 128), zstd": [("int4", {"group": 128}), "zstd"],
    "int4 (group 256), zstd": [("int4", {"group": 256}), "zstd"],
    "coded (step 0.25), zstd": [("coded", {"step": 0.25}), "zstd"],
    "coded, zstd": ["coded", "zstd"],
    "coded (step 0.45), zstd": [("coded", {"step": 0.45}), "zstd"],
    "int4 (no exact tokens), zstd": [("int4", {"exact_tokens": 0}), "zstd"],
}
console = Console()


@dataclass
class Row:
    """What was measured of one pipeline."""

    pipeline: str
    ratio: float = 0.0
    encode: float = 0.0
    batch: float = 0.0
    decode: float = 0.0
    perplexity: float = 1.0
    kl: float = 0.0
    greedy: float = 1.0
    nll: list[float] = field(default_factory=list, repr=False)
    divergence: list[float] = field(default_factory=list, repr=False)
    agreement: list[float] = field(default_factory=list, repr=False)
    sizes: list[float] = field(default_factory=list, repr=False)


def pipeline_of(steps: list[Step]) -> Pipeline:
    """The pipeline of these steps."""
    serdes = []
    for step in steps:
        name, options = (step, {}) if isinstance(step, str) else step
        cls = component("serdes", name)
        serdes.append(cls(cls.Options(**options)))
    return Pipeline(serdes)


def layout_of(model: Any) -> KVLayout:
    """Of SmolLM2, in bfloat16."""
    config = model.config
    group = LayerGroup(
        kind="attention",
        layers=tuple(range(config.num_hidden_layers)),
        kv_heads=config.num_key_value_heads,
        key_dim=config.head_dim,
        value_dim=config.head_dim,
        dtype="bfloat16",
    )
    return KVLayout(groups=(group,))


def windows(tokenizer: Any, count: int) -> list[torch.Tensor]:
    """`count` pieces of text, far apart, [1, TOKENS] each."""
    text = smollm2.document(tokenizer, 10**6)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    step = (ids.shape[1] - TOKENS) // max(1, count - 1)
    return [ids[:, n * step : n * step + TOKENS] for n in range(count)]


def prefill(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, [layers, kv_heads, tokens, dim]."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
    return (
        torch.stack([layer.keys[0] for layer in cache.layers]),
        torch.stack([layer.values[0] for layer in cache.layers]),
    )


def score(model: Any, keys: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all next tokens after each of `ids`, on top of a prefix."""
    cache = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        layer.update(keys[number : number + 1], values[number : number + 1])
    logits = model(input_ids=ids, cache=cache, use_cache=True).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def chunks_of(namespace: Namespace, keys: torch.Tensor, values: torch.Tensor) -> list[Chunk]:
    """The prefix as chunks."""
    names = namespace.keys(range(keys.shape[2]), CHUNK)
    return [
        Chunk(name, namespace, n, CHUNK, {
            "g0.k": keys[:, :, n * CHUNK : (n + 1) * CHUNK].contiguous(),
            "g0.v": values[:, :, n * CHUNK : (n + 1) * CHUNK].contiguous(),
        })
        for n, name in enumerate(names)
    ]  # fmt: skip


def through(pipeline: Pipeline, chunks: list[Chunk]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Keys and values after encoding and decoding, and the ratio."""
    frames = [memoryview(bytearray().join(encode(chunk, pipeline))) for chunk in chunks]
    got = [
        decode([data], chunk.key, pipeline, chunk.tokens).tensors
        for data, chunk in zip(frames, chunks, strict=True)
    ]
    ratio = sum(chunk.nbytes for chunk in chunks) / sum(data.nbytes for data in frames)
    return (
        torch.cat([tensors["g0.k"] for tensors in got], dim=2),
        torch.cat([tensors["g0.v"] for tensors in got], dim=2),
        ratio,
    )


def measure_quality(model: Any, document: torch.Tensor, rows: list[Row]) -> None:
    """Add one document's numbers to each row."""
    prefix, rest = document[:, :PREFIX], document[:, PREFIX:]
    targets = rest[0, 1:]
    keys, values = prefill(model, prefix)
    chunks = chunks_of(
        Namespace(model="smollm2", layout=layout_of(model), weights=WEIGHTS),
        keys,
        values,
    )
    reference = score(model, keys, values, rest)[:-1]
    best = reference.argmax(dim=-1)
    for row in rows:
        *kv, ratio = through(pipeline_of(PIPELINES[row.pipeline]), chunks)
        got = score(model, *kv, rest)[:-1]
        loss = -(got - reference).gather(1, targets[:, None]).mean()
        row.nll.append(float(loss))
        row.divergence.append(float((reference.exp() * (reference - got)).sum(dim=-1).mean()))
        row.agreement.append(float((got.argmax(dim=-1) == best).float().mean()))
        row.sizes.append(1 / ratio)


def measure_speed(chunks: list[Chunk], rows: list[Row], rounds: int) -> None:
    """GB/s of one chunk on one thread, and of all on the threads that a tier encodes on."""
    workers, chunk = DaemonPool("encode", ENCODERS), chunks[1]
    nbytes = sum(c.nbytes for c in chunks)
    for row in rows:
        pipeline = pipeline_of(PIPELINES[row.pipeline])
        data = memoryview(bytearray().join(encode(chunk, pipeline)))
        encoding = partial(encode, chunk, pipeline)
        decoding = partial(decode, [data], chunk.key, pipeline, chunk.tokens)
        row.encode = speed(encoding, chunk.nbytes, rounds)
        row.decode = speed(decoding, chunk.nbytes, rounds)

        def encode_all(pipeline: Pipeline = pipeline) -> None:
            jobs = [workers.submit(partial(encode, c, pipeline)) for c in chunks]
            for job in jobs:
                job.result()

        row.batch = speed(encode_all, nbytes, rounds)
    workers.close()


def rivals(chunk: Chunk, rounds: int) -> list[str]:
    """The same bytes through two libraries for this very job, where they are installed."""
    data = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in chunk.tensors.values())
    coders: dict[str, tuple[Callable[[], bytes], Callable[[bytes], object]]] = {}
    with contextlib.suppress(ImportError):
        import zipnn

        coder = zipnn.ZipNN(bytearray_dtype="bfloat16", input_format="byte", threads=1)
        # It reorders its input in place, so it gets a copy.
        coders["ZipNN"] = (lambda: coder.compress(bytearray(data)), coder.decompress)
    with contextlib.suppress(ImportError):
        import blosc2

        options = {
            "codec": blosc2.Codec.ZSTD, "clevel": 1, "typesize": 2, "nthreads": 1,
            "filters": [blosc2.Filter.SHUFFLE],
        }  # fmt: skip
        coders["blosc2, shuffle, zstd 1"] = (
            lambda: blosc2.compress2(data, **options),
            lambda packed: blosc2.decompress2(packed, nthreads=1),
        )
    lines = []
    for name, (compress, decompress) in coders.items():
        packed = compress()
        if bytes(decompress(packed)) != data:
            raise SystemExit(f"{name} did not bring back what it was given")
        ratio = len(data) / len(packed)
        rates = [speed(compress, len(data), rounds)]
        rates.append(speed(lambda: decompress(packed), len(data), rounds))  # noqa: B023
        beside(chunk, name, compress, lambda: decompress(packed))  # noqa: B023
        lines.append(f"| {name} | {ratio:.2f} | {rates[0]:.1f} | | {rates[1]:.1f} | | | |")
    return lines


def beside(
    chunk: Chunk, name: str, compress: Callable[[], object], decompress: Callable[[], object]
) -> None:
    """Print how fast [byteplane, zstd] is beside a rival, in turns of ten: a machine that others
    use is not as fast in one minute as in the next."""
    pipeline = pipeline_of(PIPELINES["byteplane, zstd"])
    frame = memoryview(bytearray().join(encode(chunk, pipeline)))
    pairs = {
        "encodes": (lambda: encode(chunk, pipeline), compress),
        "decodes": (lambda: decode([frame], chunk.key, pipeline, chunk.tokens), decompress),
    }
    for what, pair in pairs.items():
        ours, theirs = zip(*([speed(work, 1, 10) for work in pair] for _ in range(15)), strict=True)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        console.print(f"byteplane, zstd {what} {ratio:.2f} times as fast as {name}, in turns")


def speed(work: Callable[[], object], nbytes: int, rounds: int) -> float:
    """GB/s, of the median of `rounds`."""
    work()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return nbytes / statistics.median(seconds) / 1e9


def table(rows: list[Row], others: list[str]) -> str:
    """Markdown; `others` are finished lines."""
    lines = [
        "| pipeline | ratio | encode GB/s | batch GB/s | decode GB/s | perplexity | KL (mnat) "
        "| greedy |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r.pipeline} | {r.ratio:.2f} | {r.encode:.1f} | {r.batch:.1f} | {r.decode:.1f} "
        f"| {r.perplexity:.4f} | {1e3 * r.kl:.2f} | {r.greedy:.1%} |"
        for r in rows
    ]
    return "\n".join([*lines, *others])


def plot(rows: list[Row], file: Path) -> None:
    """Size against quality."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "lmcache-core"  # the same picture for the same numbers
    figure, axes = plt.subplots(figsize=(8, 5))
    for row in rows:
        lossy = row.kl > 0
        axes.scatter(row.ratio, 1e3 * row.kl, color="tab:orange" if lossy else "tab:blue", zorder=3)
        axes.annotate(row.pipeline, (row.ratio, 1e3 * row.kl), xytext=(5, 4),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlabel("ratio: bytes of KV per stored byte (more is better)")
    axes.set_ylabel("KL divergence, millinats (less is better)")
    axes.set_xlim(0.9, 5.0)  # room for the last labels
    axes.set_title("SmolLM2-135M, bfloat16 KV: size against quality")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def write(rows: list[Row], others: list[str], about: str) -> None:
    """Put table, numbers and picture into docs/."""
    docs = ROOT / "docs"
    page = docs / "serdes.md"
    text = page.read_text()
    start, end = "<!-- bench-serde -->", "<!-- /bench-serde -->"
    before, after = text.split(start)[0], text.split(end)[1]
    page.write_text(f"{before}{start}\n{about}\n\n{table(rows, others)}\n{end}{after}")
    short = [{k: v for k, v in asdict(r).items() if not isinstance(v, list)} for r in rows]
    (docs / "serdes.json").write_text(json.dumps({"about": about, "rows": short}, indent=1) + "\n")
    plot(rows, docs / "serdes.svg")


@torch.no_grad()
def main() -> None:
    """Measure, print, perhaps write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each pipeline")
    parser.add_argument("--write", action="store_true", help="update docs/")
    options = parser.parse_args()
    with console.status("Loading SmolLM2-135M-Instruct ..."):
        model, tokenizer = smollm2.load(torch.bfloat16)
        documents = windows(tokenizer, options.documents)
    rows = [Row(pipeline) for pipeline in PIPELINES]
    for document in track(documents, "Scoring documents", console=console):
        measure_quality(model, document, rows)
    for row in rows:
        row.ratio = 1 / statistics.mean(row.sizes)
        row.perplexity = float(torch.tensor(row.nll).mean().exp())
        row.kl, row.greedy = statistics.mean(row.divergence), statistics.mean(row.agreement)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keys, values = prefill(model, documents[0][:, :PREFIX])
    chunks = chunks_of(
        Namespace(model="smollm2", layout=layout_of(model), weights=WEIGHTS),
        keys,
        values,
    )
    measure_speed(chunks, rows, options.rounds)
    others = rivals(chunks[1], options.rounds)
    torch.set_num_threads(threads)
    scored = len(documents) * (TOKENS - PREFIX - 1)
    about = f"{len(documents)} documents, {scored:,} scored tokens; one thread of {machine()}."
    console.print(about)
    console.print(table(rows, others), soft_wrap=True)
    if options.write:
        write(rows, others, about)


if __name__ == "__main__":
    main()
