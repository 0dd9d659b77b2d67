"""What an operator and a router see."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.distributed.kv_events import AllBlocksCleared, BlockStored

from lmcache_connectors.vllm.stats import Stats
from tests.e2e.vllm.conftest import BLOCK, engine
from tests.e2e.vllm.test_changes import moved
from tests.e2e.vllm.test_connector import answers, connector, forget, prompt


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    tier = {"backend": "disk", "path": str(tmp_path / "kv"), "capacity": "1GiB"}
    memory = {"backend": "local_cpu", "capacity": "8MiB"}
    return {"chunk_size": BLOCK, "tiers": [memory, tier]}


def values() -> dict[tuple[str, ...], float]:
    """vLLM's metrics by name and labels, but those that name the engine."""
    return {
        (sample.name, *(v for k, v in sample.labels.items() if k not in ("model_name", "engine"))):
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
    }  # fmt: skip


def test_vllms_metrics_tell_of_tiers(llama: Path, disk: dict[str, Any]) -> None:
    ids = prompt(200)
    with engine(llama, disk, disable_log_stats=False) as llm:
        answers(llm, ids)
        forget(llm)
        answers(llm, ids)
        answers(llm, prompt(40, 1))  # a later step brings the last counts
        found = values()
    hit = 199 // BLOCK * BLOCK
    ours = "vllm:lmcache_core"
    assert found[f"{ours}_hit_tokens_total", "local_cpu"] == hit
    assert found[f"{ours}_loaded_chunks_total", "local_cpu"] == hit // BLOCK
    assert found[f"{ours}_loaded_bytes_total", "local_cpu"] == hit * 2 * 2 * 64 * 4
    assert found[f"{ours}_stored_chunks_total", "disk"] >= hit // BLOCK
    assert found[f"{ours}_loads_total",] == 1
    assert 0 < found[f"{ours}_load_seconds_total",] < 60
    assert f"{ours}_failed_loads_total" not in {name for name, *_ in found}
    assert found["vllm:external_prefix_cache_hits_total",] == hit
    if find_spec("vllm.v1.metrics.cache_hit_source"):  # since vLLM 0.31.1
        assert found["vllm:prompt_tokens_cached_by_source_total", "host"] == hit


def test_counts_add_up() -> None:
    one = Stats({"loads": 1, "hit_tokens|disk": 64})
    both = one.aggregate(Stats({"hit_tokens|disk": 32, "hit_tokens|redis": 16}))
    assert both.reduce() == {"loads": 1, "hit_tokens disk": 96, "hit_tokens redis": 16}
    assert not both.is_empty()
    both.reset()
    assert both.is_empty()


def test_routers_hear_what_is_stored(llama: Path, disk: dict[str, Any]) -> None:
    ids = prompt(200)
    heard: list[Any] = []
    events = {"enable_kv_cache_events": True, "publisher": "null"}
    with engine(llama, disk, kv_events_config=events) as llm:
        ours = connector(llm)
        take = ours.take_events
        ours.take_events = lambda: heard.extend(found := list(take())) or found
        answers(llm, ids)
        assert llm.reset_prefix_cache(reset_connector=True)
        answers(llm, prompt(40, 1))
        cleared = [event for event in heard if isinstance(event, AllBlocksCleared)]
        assert not cleared  # it is stored still, and belongs to what is computed
        llm.apply_model(moved("model.embed_tokens.weight"))
        answers(llm, prompt(40, 2))
    stored = [event for event in heard if isinstance(event, BlockStored)]
    assert sum(len(event.block_hashes) for event in stored[:-1]) >= 199 // BLOCK
    assert [t for event in stored for t in event.token_ids][: 2 * BLOCK] == ids[: 2 * BLOCK]
    assert {event.block_size for event in stored} == {BLOCK}
    assert any(isinstance(event, AllBlocksCleared) for event in heard)
