"""The real model and real text, as the demo has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import smollm2

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
