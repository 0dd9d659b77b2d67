"""The main job: a long document's KV is computed once, then reused from memory and from disk.

Asks two questions about a document of thousands of tokens: without a cache, with the document's KV
in memory, and in a new process that finds it on disk. Run with `make demo`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from smollm2 import document, load
from transformers.generation.streamers import BaseStreamer

import lmcache_core
from lmcache_connectors.transformers import attach

TOKENS = 4000
ANSWER_TOKENS = 40
QUESTIONS = (
    "In one sentence: what does the assert statement do?",
    "In one sentence: what is an assignment statement used for?",
)
console = Console()


@dataclass
class Run:
    """One question asked once."""

    question: int
    source: str
    prompt: int
    reused: int
    seconds: float
    answer: str


class FirstToken(BaseStreamer):
    """Notes when the first generated token is there."""

    def __init__(self) -> None:
        self.puts = 0
        self.seconds = 0.0
        self._began = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.puts += 1
        if self.puts == 2:
            self.seconds = time.perf_counter() - self._began

    def end(self) -> None:
        """Called after the last token."""


def ask(model: Any, tokenizer: Any, number: int, source: str, cache: Any = None) -> Run:
    """Ask question `number` about the document and measure the time to first token."""
    text = f"{document(tokenizer, TOKENS)}\n\n{QUESTIONS[number]}"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    before = loaded_tokens(cache)
    streamer = FirstToken()
    output = model.generate(
        **prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False, streamer=streamer
    )
    length = prompt["input_ids"].shape[1]
    answer = tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()
    reused = loaded_tokens(cache) - before
    return Run(number, source, length, reused, streamer.seconds, answer)


def loaded_tokens(cache: lmcache_core.CacheEngine | None) -> int:
    """Tokens whose KV the cache has delivered so far."""
    if cache is None:
        return 0
    chunks = sum(n for event, n in cache.stats().items() if event[0] == "loaded")
    return chunks * cache.chunk_size


def config(folder: Path) -> dict[str, Any]:
    """Memory first, disk behind it."""
    return {
        "chunk_size": 32,
        "tiers": [
            {"backend": "local_cpu", "capacity": "2GiB"},
            {"backend": "disk", "path": str(folder), "capacity": "4GiB"},
        ],
    }


def prepared() -> tuple[Any, Any]:
    """The model, once the machine is warm: first uses of libraries are nobody's TTFT.

    Nor is memory that a virtual machine has never touched, which its host backs at a few hundred
    MB/s: a server that has run for a while has that behind it.
    """
    with console.status("Loading SmolLM2-135M-Instruct ..."):
        model, tokenizer = load(torch.float32)
        model.generation_config.pad_token_id = model.generation_config.eos_token_id
        model.generate(torch.arange(100)[None], max_new_tokens=2)
        torch.ones(2 << 30, dtype=torch.uint8)
    console.print(f"Model ready: SmolLM2-135M-Instruct on {torch.get_num_threads()} CPU threads")
    return model, tokenizer


def first_process(folder: Path) -> list[Run]:
    """Both questions without a cache, then with one."""
    model, tokenizer = prepared()
    runs = []
    with console.status("Asking without a cache ..."):
        runs += [ask(model, tokenizer, n, "no cache") for n in range(2)]
    status = console.status("Asking with an empty cache, then with a full one ...")
    with status, lmcache_core.open(config(folder)) as cache, attach(model, cache):
        runs.append(ask(model, tokenizer, 0, "empty cache", cache))
        runs += [ask(model, tokenizer, n, "memory", cache) for n in (1, 0)]
    return runs


def second_process(folder: Path) -> list[Run]:
    """Both questions in a process that has computed nothing yet. Memory is empty each time."""
    model, tokenizer = prepared()
    runs = []
    for number in range(2):
        with lmcache_core.open(config(folder)) as cache, attach(model, cache):
            runs.append(ask(model, tokenizer, number, "disk, after restart", cache))
    return runs


def restarted(folder: Path) -> list[Run]:
    """What `second_process` measures, in a new process."""
    results = folder / "runs.json"
    command = [sys.executable, __file__, "--restarted", str(folder), str(results)]
    subprocess.run(command, check=True)
    return [Run(**fields) for fields in json.loads(results.read_text())]


def show(runs: list[Run]) -> bool:
    """Print the table and the answers; whether all answers agree."""
    cold = {run.question: run.seconds for run in runs if run.source == "no cache"}
    table = Table(title="Time to first token (TTFT)")
    for column in ("question", "KV from", "prompt tokens", "reused", "TTFT", "saved"):
        table.add_column(column, justify="left" if column in ("question", "KV from") else "right")
    for run in sorted(runs, key=lambda run: run.question):
        saved = 1 - run.seconds / cold[run.question]
        table.add_row(
            str(run.question + 1),
            run.source,
            f"{run.prompt:,}",
            f"{run.reused:,}",
            f"{run.seconds:.3f} s",
            f"{saved:.1%}" if run.reused else "",
        )
    console.print(table)
    agree = True
    for number, question in enumerate(QUESTIONS):
        answers = {run.answer for run in runs if run.question == number}
        agree = agree and len(answers) == 1
        console.print(f"[bold]{number + 1}. {question}[/bold]")
        for answer in sorted(answers):
            console.print(f"   {answer}", markup=False)
    verdict = "The same answers every time" if agree else "[red]The answers differ[/red]"
    console.print(f"\n{verdict}: without a cache, from memory, from disk.")
    return agree


def main() -> None:
    """Run both processes and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--restarted", nargs=2, type=Path, help=argparse.SUPPRESS)
    folders = parser.parse_args().restarted
    if folders:
        runs = second_process(folders[0])
        folders[1].write_text(json.dumps([asdict(run) for run in runs]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = first_process(folder)
        console.print("Starting a new process ...")
        runs += restarted(folder)
    if not show(runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
