"""The environment alone configures vLLM: an existing script gains the cache and changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_backends.shm import main as shm
from lmcache_connectors.vllm import cache
from lmcache_core import load_config
from tests.backends.redis_servers import redis_server
from tests.e2e.vllm.conftest import BLOCK, engine
from tests.e2e.vllm.processes import PATIENCE, environment, run, said
from tests.e2e.vllm.test_connector import answers, connector, forget, prompt, stats
from tests.servers import free_port, running

pytestmark = pytest.mark.timeout(3 * PATIENCE)

SCRIPT = """
import os
from vllm import LLM, SamplingParams
os.environ["LMCACHE_USE_LOCAL"] = "True"
os.environ["LMCACHE_LOCAL_CPU"] = "True"

llm = LLM(model=MODEL, gpu_memory_utilization=0.8)

system_prompt = "You are an expert financial analyst. " * 500
sampling_params = SamplingParams(temperature=0, max_tokens=16)
outputs1 = llm.generate([system_prompt + "What is the revenue of ACME?"], sampling_params)
outputs2 = llm.generate([system_prompt + "What is the profit of ACME?"], sampling_params)
"""
REPORT = """
import json
print("said:", json.dumps([[out[0].num_cached_tokens, list(out[0].outputs[0].token_ids)]
                  for out in (outputs1, outputs2)]))
"""


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def gib() -> Iterator[str]:
    """A size of memory, in GiB, that no other test has: it names the pool that processes share."""
    capacity = (96 << 20) + 4096 * secrets.randbelow(4096)
    yield repr(capacity / (1 << 30))
    shm(["clear", f"vllm-{capacity}"])


def test_private_memory_becomes_a_pool_where_several_processes_need_it() -> None:
    private = {"backend": "local_cpu", "name": "memory", "capacity": "1MiB", "deadline": "3s"}
    tiers = [{**private, "serde": ["zstd"]}, {"backend": "redis", "url": "redis://127.0.0.1"}]
    memory, redis = load_config({"tiers": tiers}).tiers
    shared = cache._shared(memory)
    assert (shared.backend, shared.options.capacity) == ("shm", 1 << 20)
    assert shared.options.pool == f"vllm-{1 << 20}"
    for same in ("name", "serde", "deadline", "queue", "where"):
        assert getattr(shared, same) == getattr(memory, same)
    assert cache._shared(redis) is redis


def test_a_fresh_process_has_what_an_earlier_one_put_into_memory(
    reader: Path, tmp_path: Path, gib: str
) -> None:
    """The script as users have it. vLLM's own prefix cache is empty when its process starts, so
    what the first request of the second process reuses is ours."""
    script = SCRIPT.replace("MODEL", repr(str(reader))) + REPORT
    env = environment(tmp_path, LMCACHE_MAX_LOCAL_CPU_SIZE=gib)
    first = said(run(tmp_path / "first", script, env=env))
    second = said(run(tmp_path / "second", script, env=env))
    shared = len("You are an expert financial analyst. ") * 500 // 128 * 128
    assert first[0][0] == 0
    assert first[1][0] == shared  # vLLM's own
    assert second[0][0] == shared
    assert second[1][0] == shared
    assert second[1][1] == first[1][1]  # both computed the same rest


STEP = """
import json, os, sys
from vllm import LLM, SamplingParams
settings, prompt = json.loads(sys.argv[1])
llm = LLM(**settings)
sampling = SamplingParams(temperature=0, max_tokens=12, detokenize=False)
out = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
print("said:", json.dumps([out.num_cached_tokens, list(out.outputs[0].token_ids)]))
"""


def test_two_processes_and_redis(llama: Path, tmp_path: Path) -> None:
    """One process for all of vLLM, which may end with its last write."""
    ids = prompt(500)
    settings = {
        "model": str(llama), "skip_tokenizer_init": True, "enforce_eager": True, "block_size": BLOCK,
        "dtype": "float32", "max_model_len": 1024,
    }  # fmt: skip
    port = free_port()
    env = environment(
        tmp_path,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        LMCACHE_USE_REMOTE="True",
        LMCACHE_REMOTE_URL=f"redis://127.0.0.1:{port}",
    )
    with running(redis_server(tmp_path, port)):
        told = json.dumps([settings, ids])
        cold = said(run(tmp_path / "first", STEP, told, env=env))
        warm = said(run(tmp_path / "second", STEP, told, env=env))
    assert cold[0] == 0
    assert warm == [499 // BLOCK * BLOCK, cold[1]]


def transfer(llm: Any) -> Any:
    return llm.llm_engine.vllm_config.kv_transfer_config


def test_without_a_variable_vllm_is_as_it_was(llama: Path) -> None:
    with engine(llama) as llm:
        assert transfer(llm) is None
        assert connector(llm) is None


def test_the_environment_turns_the_connector_on(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_LOCAL_CPU", "true")
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "0.1")
    ids = prompt(300)
    with engine(llama) as llm:
        assert transfer(llm).kv_load_failure_policy == "recompute"
        cold = answers(llm, ids)
        forget(llm)
        assert answers(llm, ids) == [(cold[0][0], 299 // BLOCK * BLOCK)]
        assert stats(llm)["loaded", "local_cpu"] > 0


def test_an_explicit_config_wins(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_LOCAL_CPU", "true")
    example = {
        "kv_connector": "ExampleConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }  # fmt: skip
    with engine(llama, kv_transfer_config=example) as llm:
        assert type(connector(llm)).__name__ == "ExampleConnector"


def test_a_file(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache.yaml"
    file.write_text(f"tiers:\n- backend: disk\n  path: {tmp_path}/kv\n  capacity: 1GiB\n")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(file))
    ids = prompt(300)
    with engine(llama) as llm:
        cold = answers(llm, ids)
        forget(llm)
        assert answers(llm, ids) == [(cold[0][0], 299 // BLOCK * BLOCK)]
    assert list((tmp_path / "kv").glob("chunks/*/*"))


WRONG = {
    "scheme": ({"LMCACHE_REMOTE_URL": "http://127.0.0.1"}, "LMCACHE_REMOTE_URL"),
    "unreachable": ({"LMCACHE_REMOTE_URL": "redis://127.0.0.1:1"}, "refused"),
}


@pytest.fixture(params=WRONG)
def wrong(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An environment that cannot be; what the message must name."""
    variables, named = WRONG[request.param]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return named


def test_a_wrong_environment_serves_without_a_cache_and_says_why(
    llama: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    with engine(llama) as llm:
        assert answers(llm, prompt(100))[0][1] == 0
    said = {record.message for record in caplog.records if "lmcache_core" in record.name}
    assert any(wrong in message for message in said), said
    assert all("\n" not in message for message in said)


def test_a_wrong_environment_is_an_error_if_strict(
    llama: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_STRICT", "1")
    with pytest.raises(Exception, match=wrong), contextlib.ExitStack() as stack:
        stack.enter_context(engine(llama))


DEAD = {"tiers": [{"backend": "redis", "url": "redis://127.0.0.1:1"}]}


@pytest.mark.parametrize("strict", ["in the file", "beside it", "in the environment"])
@pytest.mark.parametrize("config", ["named by the environment", "a file", "keys"])
def test_a_dead_store_is_an_error_wherever_strict_stands(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, strict: str
) -> None:
    file = tmp_path / "cache.yaml"
    keys = {**DEAD, "strict": True} if strict == "in the file" else DEAD
    file.write_text(json.dumps(keys))
    if strict == "in the environment":
        monkeypatch.setenv("LMCACHE_STRICT", "1")
    extra = {"a file": {"config_file": str(file)}, "keys": keys}.get(config)
    if extra is None:
        monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(file))
        extra = {"strict": True} if strict == "beside it" else None
    elif strict == "beside it":
        extra = {**extra, "strict": True}
    with pytest.raises(Exception, match="refused"), contextlib.ExitStack() as stack:
        stack.enter_context(engine(llama, extra))
