"""The real model and real text, as the demo has them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import smollm2


@pytest.fixture(scope="session")
def smollm() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32, and its tokenizer."""
    model, tokenizer = smollm2.load(torch.float32)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    return model, tokenizer


@pytest.fixture(scope="session")
def document(smollm: tuple[Any, Any]) -> torch.Tensor:
    """1,200 tokens of the Python language reference, [1, 1200]."""
    tokenizer = smollm[1]
    text = smollm2.document(tokenizer, 1300)
    return tokenizer(text, return_tensors="pt")["input_ids"][:, :1200]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
