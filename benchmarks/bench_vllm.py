"""Time to first token of real vLLM on the CPU, with SmolLM2-135M: from our tiers, from vLLM's own
prefix cache, computed.

    python benchmarks/bench_vllm.py [--rounds 5] [--quick] [--write] [--vllm .cache/vllm/bin/python]

Where a CPU emulates bfloat16, `--dtype float32 --lengths 1193 --rounds 3` takes about an hour.
`--hits 21` measures only *own hit* and *same process*, each so many times, and `--cold 21` only
*cold*: to know one of them closely. Their ratios are medians of those of neighbours.

Every engine is a process of its own with an engine core and a worker below it, as vLLM starts them
by default; all of them compute on all cores but the last, which is what vLLM chooses without a
connector. One without a connector lives through the whole run. In every round it and the one under
test get the same prompts of real text, that neither has seen, one after the other and each in turn
first:

    cold           the prompt is new: looked up in vain, computed, stored
    own hit        vLLM without a connector gets it again: what a cache cannot beat
    same process   vLLM's prefix cache is emptied, and the prompt comes from the tier
    fresh process  a new engine, which has computed one other prompt, gets it from the tier

TTFT is from adding a request to its first token. All figures are medians. Ratios are those of the
medians of rounds that ran side by side: cold to vLLM alone, the others to its own hit.
ExampleConnector is vLLM's own, on the same disk.

Then 32 requests arrive at once: 8 documents of 1,200 tokens, four questions each. Their documents
are in the tier and vLLM's own cache is empty, beside vLLM alone with the same empty cache, and with
one that has all documents. How many prompt tokens came from a cache is checked for every request.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import pydoc_data.topics
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_remote import markdown
from bench_tiers import console, machine
from rich.table import Table

from lmcache_backends.shm import main as shm
from tests.backends.redis_servers import redis_server
from tests.s3_server import BUCKET, KEY_ID, SECRET, s3_server
from tests.servers import free_port, running

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import smollm2

ROOT = Path(__file__).parents[1]
BLOCK = 128
"""Tokens of a block, vLLM's default on the CPU: a prompt's last one is computed."""
SPINS = 1.2
"""vLLM's worker polls for a second after a step: another engine has to wait for its core."""
DOCUMENTS, ASKED, TOKENS, QUESTION = 8, 4, 1200, 20
CAPACITY = "2GiB"
START = 300.0
Settings = dict[str, Any] | None
"""kv_transfer_config, or none."""


class Engine:
    """One of vLLM's, in processes of its own, with one prompt behind it."""

    def __init__(
        self, python: str, connector: Settings, dtype: str, text: Text, lengths: Sequence[int]
    ) -> None:
        settings = {
            "model": str(smollm2.UNPACKED), "skip_tokenizer_init": True, "dtype": dtype,
            "max_model_len": 4096, "block_size": BLOCK, "enforce_eager": True,
            "kv_cache_memory_bytes": 1 << 30, "kv_transfer_config": connector,
        }  # fmt: skip
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("vllm_engine.py")), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=os.environ | environment(),
        )  # fmt: skip
        self._hear()
        for length in lengths:
            self.ask([text.prompt(length)])

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=START)
        self._log.close()

    def ask(self, what: Any) -> Any:
        """Its answer; see vllm_engine.py."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def ttft(self, prompt: list[int], cached: int) -> float:
        """Seconds to the first token, of which so many tokens must not have been computed."""
        time.sleep(SPINS)
        ((seconds, got),) = self.ask([prompt])
        if got != cached:
            raise SystemExit(f"{got} of {len(prompt)} tokens came from a cache, not {cached}")
        return float(seconds)

    def forget(self) -> None:
        """What it computed is in its connector's tier, and nowhere else."""
        self.ask("flush")
        self.ask("reset")

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"vLLM ended:\n{self._log.read()[-4000:]}")
        return json.loads(line)


def environment() -> dict[str, str]:
    """The same cores for every engine: with a connector vLLM would reserve one more, or none."""
    cores = max(1, (os.cpu_count() or 1) - 1)
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to call `flush` in the worker
    }


class Text:
    """Real text, as prompts that share no block at their beginning."""

    def __init__(self) -> None:
        _, tokenizer = smollm2.load(torch.bfloat16)
        topics = pydoc_data.topics.topics
        text = "\n\n".join(topics[name] for name in sorted(topics))
        transformers.utils.logging.set_verbosity_error()  # it is longer than a prompt may be
        self._ids: list[int] = tokenizer(text)["input_ids"]
        self._starts = itertools.count(0, 211)

    def prompt(self, length: int) -> list[int]:
        """One that nobody has seen."""
        start = next(self._starts)
        if start + length > len(self._ids):
            raise SystemExit("the text is used up: fewer rounds, please")
        return self._ids[start : start + length]


@contextlib.contextmanager
def redis_tier(folder: Path) -> Iterator[dict[str, Any]]:
    """One Redis server."""
    port = free_port()
    with running(redis_server(folder, port)):
        yield {"backend": "redis", "url": f"redis://127.0.0.1:{port}"}


@contextlib.contextmanager
def s3_tier(folder: Path) -> Iterator[dict[str, Any]]:
    """One SeaweedFS."""
    with s3_server(folder) as server:
        login = f"{KEY_ID}:{SECRET.replace('/', '%2F')}"
        url = f"s3://{login}@{BUCKET}"
        yield {"backend": "s3", "url": url, "endpoint": server.endpoint}


@contextlib.contextmanager
def shm_tier(folder: Path) -> Iterator[dict[str, Any]]:
    """A pool that is removed afterwards."""
    pool = f"bench-{os.getpid()}"
    try:
        yield {"backend": "shm", "pool": pool, "capacity": CAPACITY}
    finally:
        shm(["clear", pool])


@contextlib.contextmanager
def disk_tier(folder: Path) -> Iterator[dict[str, Any]]:
    """Files in a temporary folder: they stay in the page cache."""
    yield {"backend": "disk", "path": str(folder / "chunks"), "capacity": CAPACITY}


TIERS = {"shm": shm_tier, "disk": disk_tier, "redis": redis_tier, "s3": s3_tier}
EXAMPLE = "ExampleConnector"


@contextlib.contextmanager
def connector(name: str) -> Iterator[Settings]:
    """kv_transfer_config of ours over one tier, or of vLLM's example."""
    settings: dict[str, Any] = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    with tempfile.TemporaryDirectory() as folder:
        if name == EXAMPLE:
            extra = {"shared_storage_path": folder}
            yield {**settings, "kv_connector": EXAMPLE, "kv_connector_extra_config": extra}
            return
        with TIERS[name](Path(folder)) as tier:
            yield {
                **settings,
                "kv_connector": "LmcacheCoreConnector",
                "kv_connector_extra_config": {"tiers": [tier], "strict": True},
            }


Figures = dict[str, list[float]]
"""Seconds of every round, by what was measured; "alone ..." is without a connector."""


class Bench:
    """The engine without a connector, and those that are measured beside it."""

    def __init__(
        self, python: str, dtype: str, text: Text, lengths: Sequence[int], rounds: int
    ) -> None:
        self._python, self._dtype, self._text = python, dtype, text
        self._lengths, self._rounds = lengths, rounds
        self._alone = self._engine(None)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self._alone.__exit__(*error)

    def _engine(self, settings: Settings) -> Engine:
        return Engine(self._python, settings, self._dtype, self._text, self._lengths)

    def measure(self, name: str) -> tuple[dict[int, Figures], Figures]:
        """TTFT by length, and the bursts, of one connector."""
        figures: dict[int, Figures] = {length: {} for length in self._lengths}
        prompts = {n: [self._text.prompt(n) for _ in range(self._rounds)] for n in self._lengths}
        with connector(name) as settings:
            with self._engine(settings) as engine:
                for n, number in itertools.product(self._lengths, range(self._rounds)):
                    self._round(figures[n], engine, prompts[n][number], number)
                bursts = {} if name == EXAMPLE else self._bursts(engine)
            for number in range(self._rounds):
                with self._engine(settings) as engine:
                    for n in self._lengths:
                        self._fresh(figures[n], engine, prompts[n][number], number)
        return figures, bursts

    def cold(self, name: str, count: int) -> dict[int, Figures]:
        """TTFT by length of one connector where nothing of a prompt is stored."""
        figures: dict[int, Figures] = {length: {} for length in self._lengths}
        with connector(name) as settings, self._engine(settings) as engine:
            for length, number in itertools.product(self._lengths, range(count)):
                self._cold(figures[length], engine, self._text.prompt(length), number)
        return figures

    def _round(self, figures: Figures, engine: Engine, prompt: list[int], number: int) -> None:
        self._cold(figures, engine, prompt, number)
        self._hit(figures, engine, prompt, number)

    def _cold(self, figures: Figures, engine: Engine, prompt: list[int], number: int) -> None:
        for ours in in_turn(number):
            if ours:
                add(figures, "cold", engine.ttft(prompt, 0))
                engine.forget()
            else:
                add(figures, "alone cold", self._alone.ttft(prompt, 0))

    def hits(self, name: str, count: int) -> dict[int, Figures]:
        """TTFT by length of one connector where all but the end of a prompt is stored."""
        figures: dict[int, Figures] = {length: {} for length in self._lengths}
        with connector(name) as settings, self._engine(settings) as engine:
            for length in self._lengths:
                prompt = self._text.prompt(length)
                for each in (engine, self._alone):
                    each.ttft(prompt, 0)
                engine.forget()
                for number in range(count):
                    self._hit(figures[length], engine, prompt, number)
        return figures

    def _hit(self, figures: Figures, engine: Engine, prompt: list[int], number: int) -> None:
        hit = (len(prompt) - 1) // BLOCK * BLOCK
        for ours in in_turn(number):
            if ours:
                engine.ask("reset")
                add(figures, "same", engine.ttft(prompt, hit))
            else:
                add(figures, "alone same", self._alone.ttft(prompt, hit))

    def _fresh(self, figures: Figures, engine: Engine, prompt: list[int], number: int) -> None:
        hit = (len(prompt) - 1) // BLOCK * BLOCK
        self._alone.ask([prompt])
        for ours in in_turn(number):
            if ours:
                add(figures, "fresh", engine.ttft(prompt, hit))
            else:
                add(figures, "alone fresh", self._alone.ttft(prompt, hit))

    def _bursts(self, engine: Engine) -> Figures:
        """Requests a second of every round, and every request's TTFT."""
        documents = [self._text.prompt(TOKENS) for _ in range(DOCUMENTS)]
        for document in documents:
            engine.ask([document])
        figures: Figures = {}
        for number in range(self._rounds):
            engine.forget()
            self._alone.ask("reset")
            for ours in in_turn(number):
                if ours:
                    burst(figures, "ours", engine, documents, hits=True)
                else:
                    burst(figures, "alone", self._alone, documents, hits=False)
            burst(figures, "own", self._alone, documents, hits=True)
        return figures


def in_turn(number: int) -> tuple[bool, bool]:
    """Who is first: ours or vLLM alone."""
    return (True, False) if number % 2 else (False, True)


def add(figures: Figures, what: str, *values: float) -> None:
    """One or several more."""
    figures.setdefault(what, []).extend(values)


def burst(
    figures: Figures, what: str, engine: Engine, documents: Sequence[list[int]], hits: bool
) -> None:
    """Questions that are new, all at once, in an order of chance."""
    prompts = [
        document + random.choices(range(1000, 40000), k=QUESTION)
        for document in list(documents) * ASKED
    ]
    random.shuffle(prompts)
    time.sleep(SPINS)
    answers = engine.ask(prompts)
    if hits and min(cached for _, cached in answers) < TOKENS // BLOCK * BLOCK:
        raise SystemExit(f"a document was computed again: {answers}")
    seconds = [seconds for seconds, _ in answers]
    add(figures, f"{what} ttft", *seconds)
    add(figures, f"{what} rate", len(prompts) / max(seconds))


def ttft_table(length: int, figures: dict[str, Figures], about: str) -> Table:
    """One row a connector."""
    table = Table(title=f"TTFT of {length:,} tokens, ms; {about}")
    for column in ("KV from", "cold", "ratio", "same process", "ratio", "fresh process", "ratio"):
        table.add_column(column, justify="left" if column == "KV from" else "right")
    alone = {
        kind: [s for figure in figures.values() for s in figure[f"alone {kind}"]]
        for kind in ("cold", "same", "fresh")
    }
    cells = [cell for seconds in alone.values() for cell in (milliseconds(seconds), "")]
    table.add_row("vLLM alone", *cells)
    for name, figure in figures.items():
        cells = []
        for kind in alone:
            ratio = statistics.median(figure[kind]) / statistics.median(figure[f"alone {kind}"])
            cells += [milliseconds(figure[kind]), f"{ratio:.3f}"]
        table.add_row(name, *cells)
    return table


def pairs_table(length: int, kind: str, figures: dict[str, Figures], about: str) -> Table:
    """One row a connector."""
    what = {"same": "stored", "cold": "new"}[kind]
    table = Table(title=f"TTFT of {length:,} tokens that are {what}, ms; {about}")
    for column in ("KV from", "TTFT", "vLLM alone", "ratio", "quartiles"):
        table.add_column(column, justify="left" if column == "KV from" else "right")
    for name, figure in figures.items():
        ours, alone = figure[kind], figure[f"alone {kind}"]
        ratios = [a / b for a, b in zip(ours, alone, strict=True)]
        low, middle, high = (f"{q:.3f}" for q in statistics.quantiles(ratios, method="inclusive"))
        row = (milliseconds(ours), milliseconds(alone), middle, f"{low} to {high}")
        table.add_row(name, *row)
    return table


def tables_of(
    got: dict[str, tuple[dict[int, Figures], Figures]], only: str, about: str
) -> list[Table]:
    """One a length, and one of the bursts."""
    tables = []
    for length in next(iter(got.values()))[0]:
        figures = {name: ttft[length] for name, (ttft, _) in got.items()}
        tables.append(
            pairs_table(length, only, figures, about) if only
            else ttft_table(length, figures, about)
        )  # fmt: skip
    if bursts := {name: burst for name, (_, burst) in got.items() if burst}:
        tables.append(burst_table(bursts, about))
    return tables


def milliseconds(seconds: Sequence[float]) -> str:
    """Their median."""
    return f"{1e3 * statistics.median(seconds):,.1f}"


def burst_table(figures: dict[str, Figures], about: str) -> Table:
    """One row a connector, and two for vLLM alone."""
    table = Table(
        title=f"{DOCUMENTS * ASKED} requests at once, {DOCUMENTS} documents of {TOKENS:,} tokens; "
        f"{about}"
    )
    for column in ("KV from", "requests/s", "ratio", "TTFT p50, ms", "p99, ms"):
        table.add_column(column, justify="left" if column == "KV from" else "right")

    def row(name: str, what: str, of: Sequence[Figures]) -> None:
        rates, alone, ttfts = (
            [value for figure in of for value in figure[kind]]
            for kind in (f"{what} rate", "alone rate", f"{what} ttft")
        )
        rate, than = statistics.median(rates), statistics.median(alone)
        percentiles = statistics.quantiles(ttfts, n=100, method="inclusive")
        p50, p99 = (f"{1e3 * percentiles[n - 1]:,.0f}" for n in (50, 99))
        table.add_row(name, f"{rate:.1f}", f"{rate / than:.2f}", p50, p99)

    row("vLLM alone, empty", "alone", list(figures.values()))
    row("vLLM's own hits", "own", list(figures.values()))
    for name, figure in figures.items():
        row(name, "ours", [figure])
    return table


def write(tables: Sequence[Table]) -> None:
    """Replace the tables in docs/vllm.md."""
    page = ROOT / "docs" / "vllm.md"
    text = page.read_text()
    start, end = "<!-- bench-vllm -->", "<!-- /bench-vllm -->"
    before, after = text.split(start)[0], text.split(end)[1]
    page.write_text("\n".join([before + start, *map(markdown, tables), end + after]))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vllm", default=str(ROOT / ".cache/vllm/bin/python"), metavar="PYTHON",
                        help="an interpreter that has vLLM and lmcache-core")  # fmt: skip
    parser.add_argument("--tiers", default=",".join([*TIERS, EXAMPLE]), help="names, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", help="float32 where a CPU emulates it")
    parser.add_argument("--lengths", default="1193,3793", help="of prompts, with commas")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--write", action="store_true", help="into docs/vllm.md")
    either.add_argument("--hits", type=int, metavar="N",
                        help="measure only hits in the same process, each N times")  # fmt: skip
    either.add_argument("--cold", type=int, metavar="N",
                        help="measure only prompts that are new, N of each length")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args()
    if 1 in (options.hits, options.cold):
        parser.error("N: expected 2 or more, for quartiles")
    rounds = 1 if options.quick else options.rounds
    lengths = [int(length) for length in options.lengths.split(",")]
    names = options.tiers.split(",")
    about = f"{options.dtype}; {machine()}"
    only = "same" if options.hits else "cold" if options.cold else ""
    got: dict[str, tuple[dict[int, Figures], Figures]] = {}
    try:
        with Bench(options.vllm, options.dtype, Text(), lengths, rounds) as bench:
            for name in names:
                with console.status(f"{name} ..."):
                    if options.hits:
                        got[name] = bench.hits(name, options.hits), {}
                    elif options.cold:
                        got[name] = bench.cold(name, options.cold), {}
                    else:
                        got[name] = bench.measure(name)
    finally:  # what fails at its end shall not cost all of an hour
        tables = tables_of(got, only, about) if got else []
        for table in tables:
            console.print(table)
    if options.write:
        write(tables)


if __name__ == "__main__":
    main()
