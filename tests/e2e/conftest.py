"""The real model and real text, as the demo has them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import smollm2

ROOT = Path(__file__).parents[2]
CHUNK = 32
DOCUMENT = 300
"""Tokens that all questions share."""


@pytest.fixture(scope="session")
def smollm() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32, and its tokenizer."""
    model, tokenizer = smollm2.load(torch.float32)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    return model, tokenizer


@pytest.fixture(scope="session")
def text(smollm: tuple[Any, Any]) -> torch.Tensor:
    """Some of the Python language reference, [1, 600]."""
    tokenizer = smollm[1]
    ids = tokenizer(smollm2.document(tokenizer, 700), return_tensors="pt")["input_ids"]
    return ids[:, :600]


@pytest.fixture(scope="session")
def document(text: torch.Tensor) -> torch.Tensor:
    """The first half of it, [1, 300]."""
    return text[:, :DOCUMENT]


@pytest.fixture(scope="session")
def prompts(smollm: tuple[Any, Any], document: torch.Tensor) -> list[torch.Tensor]:
    """Two questions about the document."""
    questions = ("What does the assert statement do?", "What is a coroutine?")
    ids = [smollm[1](f"\n\n{text}\n", return_tensors="pt")["input_ids"] for text in questions]
    return [torch.cat([document, question], dim=1) for question in ids]


@pytest.fixture(scope="session")
def answers(smollm: tuple[Any, Any], prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the model answers to `prompts` without a cache."""
    return [answer(smollm[0], ids) for ids in prompts]


def answer(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The prompt and 16 tokens more."""
    return model.generate(ids, max_new_tokens=16, do_sample=False)


class Node:
    """A process that has loaded the model and waits for what it is asked."""

    def __init__(self, within: Sequence[str] = ()) -> None:
        program = Path(__file__).with_name("node.py")
        self._process = subprocess.Popen(
            [*within, sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def ready(self) -> None:
        assert self._process.stdout.readline() == "ready\n"

    def answer(self, tier: dict[str, Any], text: torch.Tensor) -> dict[str, Any]:
        self.ask(tier, text)
        line = self._process.stdout.readline()
        assert line, "the node ended; it said why above"
        return json.loads(line)

    def ask(self, tier: dict[str, Any], text: torch.Tensor) -> None:
        """Let it begin."""
        config = {"chunk_size": CHUNK, "tiers": [tier]}
        self._process.stdin.write(json.dumps([config, text.tolist()]) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """With kill -9."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def two_nodes(first: Sequence[str] = (), second: Sequence[str] = ()) -> Iterator[list[Node]]:
    """Each within what its command runs."""
    nodes = [Node(first), Node(second)]
    try:
        for node in nodes:
            node.ready()
        yield nodes
    finally:
        for node in nodes:
            node.close()


@pytest.fixture(scope="session")
def nodes() -> Iterator[list[Node]]:
    """Two processes that have loaded the model, on one machine."""
    with two_nodes() as nodes:
        yield nodes
