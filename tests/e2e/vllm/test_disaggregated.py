"""The example of disaggregated prefill: a prompt is computed here, and answered there."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import redis as stock

from tests.backends.redis_servers import eventually, redis_server
from tests.e2e.vllm.conftest import BLOCK, engine
from tests.e2e.vllm.processes import (
    PATIENCE,
    ROOT,
    Instance,
    Process,
    answered,
    completion,
    environment,
    post,
)
from tests.e2e.vllm.test_connector import answers
from tests.servers import Server, free_port, running

pytestmark = [pytest.mark.timeout(3 * PATIENCE), pytest.mark.xdist_group("vllm-disaggregated")]

PROXY = ROOT / "examples" / "disaggregated_prefill" / "proxy.py"


class Instances(NamedTuple):
    prefill: Instance
    decode: Instance
    proxy: str
    """Its URL."""
    redis: int
    """Its port."""


@pytest.fixture(scope="module")
def instances(reader: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instances]:
    folder = tmp_path_factory.mktemp("disaggregated")
    port, proxy = free_port(), free_port()
    tier = {"backend": "redis", "url": f"redis://127.0.0.1:{port}"}
    env = environment(folder)

    def instance(role: str) -> Instance:
        kv = {
            "kv_connector": "LmcacheCoreConnector", "kv_role": f"kv_{role}",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"chunk_size": BLOCK, "tiers": [tier]},
        }  # fmt: skip
        return Instance(folder / role, reader, env, kv)

    with (
        running(redis_server(folder, port)),
        instance("producer") as prefill,
        instance("consumer") as decode,
    ):
        command = [sys.executable, str(PROXY), f"--port={proxy}"]
        command += [f"--prefill={prefill.url}", f"--decode={decode.url}"]
        with Process(folder / "proxy", command, env):
            prefill.ready()
            decode.ready()
            yield Instances(prefill, decode, f"http://127.0.0.1:{proxy}", port)


def prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 258), k=400)


REUSED = 399 // BLOCK * BLOCK


def test_the_decode_instance_computes_next_to_nothing(instances: Instances, reader: Path) -> None:
    """The tokens are those of one instance that does all."""
    prompts = [prompt(seed) for seed in range(3)]
    with engine(reader) as llm:
        alone = [tokens for tokens, _ in answers(llm, *prompts)]
    for ids, tokens in zip(prompts, alone, strict=True):
        text = post(f"{instances.proxy}/v1/completions", completion(ids))
        assert answered(text) == (tokens, REUSED)
    assert instances.decode.metric("vllm:lmcache_core_hit_tokens", tier="redis") >= 3 * REUSED
    assert instances.decode.metric("vllm:lmcache_core_stored_chunks") == 0
    assert instances.prefill.metric("vllm:lmcache_core_hit_tokens") == 0


def test_the_answer_streams_through(instances: Instances) -> None:
    ids = prompt(10)
    whole, _ = answered(post(f"{instances.proxy}/v1/completions", completion(ids)))
    more = {"stream": True, "stream_options": {"include_usage": True}}
    text = post(f"{instances.proxy}/v1/completions", completion(ids, **more))
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    parts = [json.loads(event) for event in events[:-1]]
    portions = [part["choices"][0]["token_ids"] for part in parts if part["choices"]]
    assert len(portions) > 1
    assert [token for portion in portions for token in portion] == whole


def test_the_decode_instance_waits_for_what_was_announced(instances: Instances) -> None:
    """What comes late is loaded; what never comes is computed."""
    ids, other = prompt(20), prompt(21)
    blocks = 400 // BLOCK
    with stock.Redis(port=instances.redis) as client, ThreadPoolExecutor(1) as thread:
        client.flushall()
        text = instances.prefill.post("/v1/completions", completion(ids, max_tokens=1))
        announced = json.loads(text)["kv_transfer_params"]
        assert announced == {"lmcache_core_tokens": blocks * BLOCK}
        eventually(lambda: client.dbsize() == blocks)
        kept = {key: client.get(key) for key in client.scan_iter()}
        client.flushall()
        late = thread.submit(instances.decode.ask, ids, kv_transfer_params=announced)
        time.sleep(0.3)
        client.mset(kept)
        assert late.result()[1] == REUSED
    tokens, reused = instances.decode.ask(other, kv_transfer_params=announced)
    assert reused == 0
    assert tokens == instances.decode.ask(other)[0]


def test_without_a_prefill_instance_the_other_does_all(
    instances: Instances, tmp_path: Path
) -> None:
    port = free_port()
    command = [sys.executable, str(PROXY), f"--port={port}"]
    command += [f"--prefill=http://127.0.0.1:{free_port()}", f"--decode={instances.decode.url}"]
    url = f"http://127.0.0.1:{port}/v1/completions"
    with running(Server(command, lambda: post(url, completion(prompt(31), max_tokens=1)))):
        tokens, reused = answered(post(url, completion(prompt(30))))
    assert (len(tokens), reused) == (12, 0)
