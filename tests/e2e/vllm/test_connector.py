"""The connector in real vLLM: the same tokens as without it, and fewer of them computed."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler

from lmcache_connectors.vllm.connector import LmcacheCoreConnector
from lmcache_core.io.memory import HostBuffers
from tests.backends.redis_servers import redis_server
from tests.backends.test_memcached import memcached_server
from tests.e2e.vllm.conftest import BLOCK, engine
from tests.s3_server import BUCKET, KEY_ID, SECRET, s3_server
from tests.servers import Server, eventually, free_port, running
from tests.threads import no_more_threads

GREEDY = SamplingParams(temperature=0, max_tokens=12, detokenize=False)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 512), k=length)


def answers(llm: Any, *prompts: list[int], **more: Any) -> list[tuple[list[int], int]]:
    """(tokens, how many of the prompt's were not computed) of each."""
    asked = [{"prompt_token_ids": ids, **more} for ids in prompts]
    outs = llm.generate(asked, GREEDY, use_tqdm=False)
    return [(list(out.outputs[0].token_ids), out.num_cached_tokens) for out in outs]


def connector(llm: Any) -> LmcacheCoreConnector:
    """The scheduler's."""
    return llm.llm_engine.engine_core.engine_core.scheduler.connector


def worker(llm: Any) -> LmcacheCoreConnector:
    """The worker's."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def stats(llm: Any) -> dict[tuple[str, ...], int]:
    return connector(llm)._scheduler._cache.engine.stats()


def flush(llm: Any) -> None:
    assert worker(llm)._worker.flush(20)


def forget(llm: Any) -> None:
    """vLLM's own prefix cache, not ours."""
    flush(llm)
    assert llm.reset_prefix_cache()


@pytest.fixture
def memory() -> dict[str, Any]:
    return {"chunk_size": BLOCK, "tiers": [{"backend": "local_cpu", "capacity": "64MiB"}]}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[dict[str, Any], Server]]:
    port = free_port()
    with running(redis_server(tmp_path, port)) as server:
        tier = {"backend": "redis", "url": f"redis://127.0.0.1:{port}", "deadline": "2s"}
        yield {"chunk_size": BLOCK, "tiers": [tier]}, server


MODELS = pytest.mark.parametrize("name", ["llama", "gemma", "mistral"])


@pytest.fixture
def model(name: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(name)


# The main job


@MODELS
def test_a_later_request_and_a_later_engine_reuse_what_was_computed(
    model: Path, disk: dict[str, Any]
) -> None:
    """The same tokens as vLLM computes, and as it answers on its own prefix hit; bit for bit the
    same blocks."""
    one, two = prompt(300), [*prompt(300)[:250], *prompt(60, 1)]
    with engine(model) as llm:
        cold = answers(llm, one), answers(llm, two)
        own = answers(llm, one)[0]
    with engine(model, disk) as llm:
        assert answers(llm, one) == cold[0]
        stored = blocks_of(llm, 300 // BLOCK)
        forget(llm)
        assert answers(llm, one)[0] == own
        flush(llm)
    with engine(model, disk) as llm:
        ((tokens, reused),) = answers(llm, one)
        assert (tokens, reused) == own
        assert reused == 299 // BLOCK * BLOCK
        assert same_blocks(blocks_of(llm, 299 // BLOCK), stored)
        ((tokens, reused),) = answers(llm, two)
        assert tokens == cold[1][0][0]
        assert reused == 250 // BLOCK * BLOCK
        assert ("missed", "damaged", "disk") not in stats(llm)


def blocks_of(llm: Any, count: int) -> list[list[torch.Tensor]]:
    """The KV of the first blocks of the one request that vLLM has in its prefix cache."""
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    by_hash = manager.block_pool.cached_block_hash_to_block._cache
    found: list[list[torch.Tensor]] = []
    for number, memory in enumerate(worker(llm)._worker._memory):
        ids = sorted(
            block.block_id
            for entry in by_hash.values()
            for block in ([entry] if hasattr(entry, "block_id") else entry.values())
            if int.from_bytes(block.block_hash[-4:], "big") == number
        )
        found.append([torch.stack([layer[i] for layer in memory._layers]) for i in ids[:count]])
    return found


def same_blocks(some: Sequence[Sequence[torch.Tensor]], others: Sequence[Any]) -> bool:
    """Every block that is there is one of those that were stored."""
    for mine, theirs in zip(some, others, strict=True):
        known = {as_bytes(block) for block in theirs}
        if not mine or any(as_bytes(block) not in known for block in mine):
            return False
    return True


def as_bytes(block: torch.Tensor) -> bytes:
    return block.contiguous().view(torch.uint8).numpy().tobytes()


@MODELS
def test_redis_between_two_engines(model: Path, redis: tuple[dict[str, Any], Server]) -> None:
    through(redis[0]["tiers"][0], model)


def test_memcached_between_two_engines(llama: Path) -> None:
    port = free_port()
    with running(memcached_server(port)):
        through({"backend": "memcached", "url": f"memcached://127.0.0.1:{port}"}, llama)


def test_s3_between_two_engines(llama: Path, tmp_path: Path) -> None:
    with s3_server(tmp_path) as server:
        login = f"{KEY_ID}:{quote(SECRET, safe='')}"
        url = f"s3://{login}@{BUCKET}"
        through({"backend": "s3", "url": url, "endpoint": server.endpoint}, llama)


def through(tier: dict[str, Any], model: Path) -> None:
    """What one engine computes, another one has from the store."""
    ids, extra = prompt(500), {"chunk_size": BLOCK, "tiers": [tier], "strict": True}
    with engine(model, extra) as llm:
        cold = answers(llm, ids)
        flush(llm)
    with engine(model, extra) as llm:
        ((tokens, reused),) = answers(llm, ids)
        assert tokens == cold[0][0]
        assert reused == 499 // BLOCK * BLOCK


@MODELS
@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 8 * BLOCK, 8 * BLOCK + 1])
def test_prompts_that_end_at_a_block_or_beside_it(
    model: Path, disk: dict[str, Any], length: int
) -> None:
    """A prompt that is stored in full still computes its last block, for the next token."""
    ids = prompt(length)
    with engine(model, disk) as llm:
        cold = answers(llm, ids)
        forget(llm)
        ((tokens, reused),) = answers(llm, ids)
        assert tokens == cold[0][0]
        assert reused == (length - 1) // BLOCK * BLOCK


# How vLLM schedules


@MODELS
def test_prefill_in_portions(model: Path, disk: dict[str, Any]) -> None:
    options = {"max_num_batched_tokens": 96, "max_num_seqs": 4}
    prompts = [prompt(700, seed) for seed in range(3)]
    with engine(model, disk, **options) as llm:
        cold = answers(llm, *prompts)
        forget(llm)
        warm = answers(llm, *prompts)
        assert [tokens for tokens, _ in warm] == [tokens for tokens, _ in cold]
        assert all(reused == 699 // BLOCK * BLOCK for _, reused in warm)


@pytest.mark.parametrize(("name", "blocks"), [("llama", 30), ("gemma", 64)])
def test_requests_that_are_preempted(
    model: Path, blocks: int, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few blocks for all: vLLM takes some back and begins these requests anew."""
    preempted: list[str] = []
    preempt = Scheduler._preempt_request

    def noted(self: Scheduler, request: Any, *args: Any, **more: Any) -> None:
        preempted.append(request.request_id)
        preempt(self, request, *args, **more)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    prompts = [prompt(200, seed) for seed in range(6)]
    long = SamplingParams(temperature=0, max_tokens=90, detokenize=False, ignore_eos=True)

    def run(llm: Any) -> list[list[int]]:
        outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], long, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outs]

    with engine(model) as llm:
        plain = run(llm)
    assert not preempted
    with engine(model, disk, num_gpu_blocks_override=blocks, max_model_len=320) as llm:
        assert run(llm) == plain
        assert run(llm) == plain
        forget(llm)
        assert run(llm) == plain
    assert preempted


def test_many_requests_that_share_documents(llama: Path, disk: dict[str, Any]) -> None:
    documents = [prompt(256, seed) for seed in range(4)]
    prompts = [[*documents[n % 4], *prompt(20, 100 + n)] for n in range(16)]
    with engine(llama) as llm:
        plain = [tokens for tokens, _ in answers(llm, *prompts)]
    with engine(llama, disk) as llm:
        assert [tokens for tokens, _ in answers(llm, *prompts)] == plain
        forget(llm)
        warm = answers(llm, *prompts)
        assert [tokens for tokens, _ in warm] == plain
        assert all(reused >= 256 for _, reused in warm)


def test_a_conversation_goes_on_from_generated_tokens(llama: Path, disk: dict[str, Any]) -> None:
    long = SamplingParams(temperature=0, max_tokens=80, detokenize=False, ignore_eos=True)
    with engine(llama, disk) as llm:
        first = prompt(100)
        out = llm.generate([{"prompt_token_ids": first}], long, use_tqdm=False)[0]
        turn = [*first, *out.outputs[0].token_ids, *prompt(10, 5)]
        forget(llm)
        ((_, reused),) = answers(llm, turn)
        assert reused == 179 // BLOCK * BLOCK


# Whose KV it is


def test_tenants_and_models_share_nothing(
    llama: Path, tmp_path: Path, disk: dict[str, Any]
) -> None:
    ids = prompt(200)
    with engine(llama, disk) as llm:
        answers(llm, ids, cache_salt="alice")
        forget(llm)
        assert answers(llm, ids, cache_salt="bob")[0][1] == 0
        assert answers(llm, ids)[0][1] == 0
        forget(llm)
        assert answers(llm, ids, cache_salt="alice")[0][1] > 0
        flush(llm)
    from transformers import AutoConfig

    from tests.e2e.vllm.conftest import saved

    other = tmp_path / llama.name  # the same name, other weights
    saved(AutoConfig.from_pretrained(llama), other, seed=1)
    with engine(other, disk) as llm:
        assert answers(llm, ids)[0][1] == 0
    with engine(llama, disk, block_size=64) as llm:
        assert answers(llm, ids)[0][1] == 0
    with engine(llama, disk) as llm:
        assert answers(llm, ids)[0][1] > 0


def test_a_reset_of_the_connector_finds_again_what_the_same_weights_computed(
    llama: Path, disk: dict[str, Any]
) -> None:
    """What is stored is known by what the workers hold, and a reset changes none of it."""
    ids = prompt(200)
    with engine(llama, disk) as llm:
        cold = answers(llm, ids)[0][0]
        flush(llm)
        assert llm.reset_prefix_cache(reset_connector=True)
        assert answers(llm, ids) == [(cold, 199 // BLOCK * BLOCK)]


def test_memory_for_first_loads_is_got_ahead_where_blocks_are_loaded(
    gemma: Path, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[Sequence[int]] = []
    monkeypatch.setattr(HostBuffers, "warm", lambda self, sizes: got.append(sizes))
    with engine(gemma, disk) as llm:
        parts = worker(llm)._worker._shape.parts
        chunks = [part.layout.bytes_per_token * BLOCK for part in parts]
        eventually(lambda: got)
        (sizes,) = got  # once, by the worker: not by the scheduler, which loads nothing
        assert len(sizes) == len(chunks) > 1
        assert all(size > chunk for size, chunk in zip(sizes, chunks, strict=True))


# Faults


@MODELS
def test_damaged_frames_change_time_and_never_tokens(
    model: Path, disk: dict[str, Any], tmp_path: Path
) -> None:
    ids = prompt(400)
    chance = random.Random(1)
    with engine(model, disk) as llm:
        cold = answers(llm, ids)[0][0]
        for _ in range(5):
            forget(llm)
            files = sorted((tmp_path / "kv").glob("chunks/*/*"))
            for file in chance.sample(files, 3):
                data = bytearray(file.read_bytes())
                data[chance.randrange(len(data))] ^= 0xFF
                file.write_bytes(data[: chance.choice((len(data), len(data) // 2))])
            assert answers(llm, ids)[0][0] == cold
        assert any(event[:2] == ("missed", "damaged") for event in stats(llm))


@MODELS
def test_a_store_that_dies_under_the_engine(
    model: Path, redis: tuple[dict[str, Any], Server]
) -> None:
    extra, server = redis
    ids, other = prompt(400), prompt(400, 1)
    with engine(model, extra) as llm:
        cold, second = answers(llm, ids)[0][0], answers(llm, other)[0][0]
        forget(llm)
        server.kill()
        assert answers(llm, ids, other) == [(cold, 0), (second, 0)]
        server.start()
        for _ in range(100):
            forget(llm)
            ((tokens, reused),) = answers(llm, ids)
            assert tokens == cold
            if reused:
                break
        assert reused == 399 // BLOCK * BLOCK


def test_a_store_that_hangs_does_not_hold_the_engine(
    llama: Path, redis: tuple[dict[str, Any], Server]
) -> None:
    extra, server = redis
    ids = prompt(400)
    with engine(llama, extra) as llm:
        cold = answers(llm, ids)[0][0]
        forget(llm)
        server.freeze()
        assert answers(llm, ids) == [(cold, 0)]
        server.thaw()


# What cannot be


@pytest.mark.parametrize(
    "extra",
    [
        {"tiers": [{"backend": "disk", "path": "/proc/no", "capacity": "1GiB"}]},
        {"tiers": [{"backend": "redis", "url": "http://x"}]},
        {"tires": []},
        {"config_file": "/no/such.yaml"},
    ],
)
def test_a_config_that_cannot_be_serves_without_a_cache_or_is_an_error_if_strict(
    llama: Path, extra: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with engine(llama, extra) as llm:
        assert answers(llm, prompt(100))[0][1] == 0
    assert caplog.text.count("lmcache-core is off") == 1
    with pytest.raises(Exception, match=r"tiers|tires|no.such"), contextlib.ExitStack() as stack:
        stack.enter_context(engine(llama, {**extra, "strict": True}))


@pytest.mark.parametrize("job", ["lookup", "load", "store"])
def test_where_no_thread_can_be_had_it_serves_without_a_cache(
    job: str, llama: Path, disk: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    text, before = prompt(100), set(threading.enumerate())
    with no_more_threads(f"lmcache-vllm-{job}"), engine(llama, disk) as llm:
        first = answers(llm, text)
        llm.reset_prefix_cache()
        assert answers(llm, text) == first
        assert first[0][1] == 0
        new = {thread.name for thread in set(threading.enumerate()) - before}
        assert job == "lookup" or not new & {"lmcache-vllm-load", "lmcache-vllm-store"}
    assert caplog.text.count("lmcache-core is off") == 1
    assert "can't start new thread" in caplog.text
