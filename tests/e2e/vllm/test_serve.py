"""`vllm serve` over HTTP: two servers, one after the other, with nothing in common but a disk."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.backends.redis_servers import eventually
from tests.e2e.vllm.conftest import BLOCK
from tests.e2e.vllm.processes import PATIENCE, Instance, environment

pytestmark = [pytest.mark.timeout(3 * PATIENCE), pytest.mark.xdist_group("vllm-serve")]

ONE, TWO = (random.Random(seed).choices(range(3, 258), k=400) for seed in (1, 2))
REUSED = 399 // BLOCK * BLOCK


@pytest.fixture(scope="module")
def start(reader: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a server, each time with the same disk."""
    folder = tmp_path_factory.mktemp("serve")
    tier = {"backend": "disk", "path": str(folder / "kv"), "capacity": "1GiB"}
    kv = {
        "kv_connector": "LmcacheCoreConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"chunk_size": BLOCK, "tiers": [tier]},
    }  # fmt: skip
    env = environment(folder, VLLM_SERVER_DEV_MODE="1")

    def make(name: str) -> Instance:
        return Instance(folder / name, reader, env, kv)

    return make


@pytest.fixture(scope="module")
def first(start: Any) -> Iterator[dict[str, Any]]:
    """What a server said that has ended: by computing, by vLLM's own cache, and by ours."""
    with start("first") as server:
        server.ready()
        said = {"cold": server.ask(ONE), "own": server.ask(ONE), "other": server.ask(TWO)}
        assert json.loads(server.post("/reset_prefix_cache", {})) == {"success": True}
        said["ours"] = server.ask(ONE)
        said["stored"] = server.metric("vllm:lmcache_core_stored_chunks", tier="disk")
        server.post("/reset_prefix_cache?reset_external=true", {})
        said["anew"] = server.ask(ONE)
        said["started"] = server.running()
        server.terminate()
        said["status"] = server.wait()
        eventually(lambda: not server.running())
        said["log"] = server.out + server.err
        yield said


@pytest.fixture(scope="module")
def second(start: Any, first: dict[str, Any]) -> Iterator[Instance]:
    """A running server that began where the first had ended."""
    with start("second") as server:
        yield server.ready()


def test_after_a_reset_of_its_own_cache_a_server_has_ours(first: dict[str, Any]) -> None:
    tokens, reused = first["cold"]
    assert reused == 0
    assert first["own"] == (tokens, REUSED)
    assert first["ours"] == (tokens, REUSED)
    assert first["stored"] == 2 * (400 // BLOCK)
    assert first["anew"] == (tokens, REUSED)  # looked at again: the weights are what they were


def test_a_server_ends_when_it_is_told_to(first: dict[str, Any]) -> None:
    """With all its processes, which `first` waits for."""
    assert len(first["started"]) >= 3, first["started"]  # the leash, the server, its engine core
    assert first["status"] == 0
    assert "Traceback" not in first["log"]


def test_the_next_server_answers_from_what_the_first_stored(
    first: dict[str, Any], second: Instance
) -> None:
    def metric(name: str, **labels: str) -> float:
        return second.metric(f"vllm:{name}", **labels)

    assert second.ask(ONE) == (first["cold"][0], REUSED)
    assert second.ask(TWO) == (first["other"][0], REUSED)
    for tokens in (
        metric("lmcache_core_hit_tokens", tier="disk"),
        metric("external_prefix_cache_hits"),
        metric("prompt_tokens_cached_by_source", source="disk"),
    ):
        assert tokens == 2 * REUSED
    assert metric("external_prefix_cache_queries") == 2 * 400
    second.ask(ONE)  # what workers counted comes with the next step
    assert metric("lmcache_core_loads") == 2
    assert metric("lmcache_core_failed_loads") == 0
    assert metric("lmcache_core_loaded_chunks", tier="disk") == 2 * (REUSED // BLOCK)
    kv = 2 * 2 * 2 * 32 * 4  # bytes of a token: layers, K and V, heads, width, float32
    assert metric("lmcache_core_loaded_bytes", tier="disk") == pytest.approx(
        2 * REUSED * kv, rel=0.1
    )
    assert 0 < metric("lmcache_core_load_seconds") < PATIENCE
    assert metric("lmcache_core_stored_chunks") == 0


def test_requests_at_once(second: Instance, first: dict[str, Any]) -> None:
    """Loads and computing beside each other; each answer is its own."""
    from concurrent.futures import ThreadPoolExecutor

    second.post("/reset_prefix_cache", {})
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(second.ask, [ONE, TWO] * 4))
    assert [tokens for tokens, _ in answers] == [first["cold"][0], first["other"][0]] * 4
    assert all(reused == REUSED for _, reused in answers)
