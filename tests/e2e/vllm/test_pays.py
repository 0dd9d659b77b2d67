"""Never slower than recomputing: vLLM computes what a store would bring later."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_backends.disk import DiskBackend
from lmcache_core.engine import load_gate as pays
from tests.e2e.vllm.conftest import BLOCK, engine
from tests.e2e.vllm.test_connector import answers, connector, forget, prompt, stats

REUSED = 399 // BLOCK * BLOCK


def test_a_store_slower_than_computing_is_bypassed_and_comes_back(
    llama: Path, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pays, "PAUSE_SECONDS", (5.0, 5.0))
    disk["tiers"][0]["deadline"] = "60s"
    get, seconds = DiskBackend.get, 2.0

    def slow(self: DiskBackend, *arguments: Any) -> Iterator[Any]:
        time.sleep(seconds)
        return get(self, *arguments)

    prompts = [prompt(400, seed) for seed in range(pays.LOADS + 2)]
    with engine(llama, {**disk, "load": "when_faster"}) as llm:
        cold = [answers(llm, ids)[0] for ids in prompts]
        forget(llm)
        monkeypatch.setattr(DiskBackend, "get", slow)
        *tried, bypassed, later = prompts
        for ids, (tokens, _) in zip(tried, cold, strict=False):
            assert answers(llm, ids) == [(tokens, REUSED)]
        began = time.monotonic()
        assert answers(llm, bypassed) == [cold[pays.LOADS]]
        assert time.monotonic() - began < seconds
        assert stats(llm)["bypassed", "loads", "disk"] == 1
        seconds = 0.0
        while not connector(llm)._scheduler._cache.engine.load_gate.allows(0):
            time.sleep(0.1)
        assert answers(llm, later) == [(cold[-1][0], REUSED)]


def test_what_came_before_a_block_that_did_not_is_booked(
    llama: Path, disk: dict[str, Any], tmp_path: Path
) -> None:
    told: list[tuple[int, int, float]] = []
    with engine(llama, disk) as llm:
        cold = answers(llm, prompt(400))[0][0]
        forget(llm)
        cache = connector(llm)._scheduler._cache.engine
        cache.load_gate.record_load = lambda *load: told.append(load)
        get = DiskBackend.get

        def only_two(self: DiskBackend, *arguments: Any) -> Iterator[Any]:
            return itertools.islice(get(self, *arguments), 2)

        with pytest.MonkeyPatch.context() as store:
            store.setattr(DiskBackend, "get", only_two)
            assert answers(llm, prompt(400))[0][0] == cold
    ((tier, tokens, _),) = told
    assert (tier, tokens % BLOCK) == (0, 0)
    assert 0 < tokens < REUSED


def test_vllm_tells_what_computing_and_loading_took(llama: Path, disk: dict[str, Any]) -> None:
    with engine(llama, {**disk, "load": "when_faster"}) as llm:
        scheduler = connector(llm)._scheduler
        told: list[tuple[int, int, float]] = []
        began = time.monotonic()
        answers(llm, prompt(400))
        forget(llm)
        scheduler._cache.engine.load_gate.record_load = lambda *load: told.append(load)
        answers(llm, prompt(400))
        elapsed = time.monotonic() - began
        (speed,) = scheduler._cache.engine.load_gate._speeds  # of the prefill, of no other step
        assert 400 / elapsed < speed < 1e6
        ((tier, tokens, seconds),) = told
        assert (tier, tokens) == (0, REUSED)
        assert 0 < seconds < elapsed
        assert repr(scheduler._steps) == "Steps(0 under way)"
