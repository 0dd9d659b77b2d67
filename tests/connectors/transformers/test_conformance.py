"""The Transformers connector keeps what every connector promises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lmcache_core
from lmcache_connectors.transformers import attach
from lmcache_core import CacheEngine
from lmcache_core.testing import Answer, ConnectorConformance, Serve


class Generating:
    """A model whose `generate` a cache may serve."""

    def __init__(self, model: LlamaForCausalLM, cache: CacheEngine | None) -> None:
        self._model, self._cache = model, cache

    def answer(self, prompt: Sequence[int]) -> Answer:
        before = self._loaded()
        ids = torch.tensor([prompt])
        output = self._model.generate(ids, max_new_tokens=8, do_sample=False)
        if self._cache:
            assert self._cache.flush(20)
        return Answer(output[0, len(prompt) :].tolist(), self._loaded() - before)

    def _loaded(self) -> int:
        if self._cache is None:
            return 0
        stats = self._cache.stats()
        chunks = sum(n for labels, n in stats.items() if labels[0] == "loaded")
        return chunks * self._cache.chunk_size


class TestTransformers(ConnectorConformance):
    @pytest.fixture
    def serve(self) -> Serve:
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=512, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        weights = LlamaForCausalLM(config).state_dict()

        @contextlib.contextmanager
        def serve(settings: Mapping[str, Any] | None) -> Iterator[Generating]:
            model = LlamaForCausalLM(config)
            model.load_state_dict(weights)
            model.eval()
            if settings is None:
                yield Generating(model, None)
                return
            with lmcache_core.open(settings) as cache, attach(model, cache):
                yield Generating(model, cache)

        return serve
