"""vLLM's own offloading with our stores behind it: bit for bit what was offloaded, or a miss."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.config import LoRAConfig, VllmConfig
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
from vllm.v1.kv_offload.base import LookupResult
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

from lmcache_connectors.vllm.tier import LmcacheCoreTier
from lmcache_core import ConfigError
from tests.backends.redis_servers import eventually, redis_server
from tests.e2e.vllm.conftest import BLOCK, engine, saved
from tests.e2e.vllm.native import PATIENCE, Offloading, content, same, transfer, vllm_config
from tests.servers import Server, free_port, running
from tests.threads import no_more_threads

GREEDY = SamplingParams(temperature=0, max_tokens=12, detokenize=False)
Open = Callable[..., Offloading]


@pytest.fixture(scope="module")
def config(llama: Path) -> VllmConfig:
    return vllm_config(llama)


@pytest.fixture
def opened(config: VllmConfig) -> Iterator[Open]:
    """Opens vLLM's manager with our tier; closes all at the end."""
    with contextlib.ExitStack() as stack:

        def open_one(
            tier: dict[str, Any],
            config: VllmConfig = config,
            rows: int = 8,
            weights: bytes = b"some",
        ) -> Offloading:
            offloading = Offloading(config, tier, rows, weights)
            stack.callback(offloading.close)
            return offloading

        yield open_one


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    return {"tiers": [{"backend": "disk", "path": str(tmp_path / "kv"), "capacity": "1GiB"}]}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[dict[str, Any], Server]]:
    port = free_port()
    with running(redis_server(tmp_path, port)) as server:
        tier = {"backend": "redis", "url": f"redis://127.0.0.1:{port}", "deadline": "2s"}
        yield {"tiers": [tier]}, server


@pytest.fixture(params=["disk", "redis", "memory over disk"])
def store(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "redis":
        return request.getfixturevalue("redis")[0]
    disk = request.getfixturevalue("disk")
    if request.param == "disk":
        return disk
    return {"tiers": [{"backend": "local_cpu", "capacity": "1MiB"}, *disk["tiers"]]}


def flush(offloading: Offloading) -> None:
    assert offloading.tier._rows._cache.flush(20)


def test_blocks_come_back_bit_for_bit_here_and_in_another_engine(
    store: dict[str, Any], opened: Open
) -> None:
    blocks = content(6, 8192)
    keys, unknown = list(blocks), list(content(1, 1))
    first = opened(store)
    assert first.find(keys) == {}
    first.store(blocks)
    first.forget()
    assert same(first.find(keys), blocks)
    flush(first)
    second = opened(store)
    assert same(second.find(keys), blocks)
    third = opened(store)
    assert list(third.find([*keys[2:4], *unknown, keys[5]])) == keys[2:4]
    assert same(third.find(keys[::-1]), blocks)


CALLS = [
    *("lookup", "submit_load", "submit_store", "get_finished_jobs", "on_new_request"),
    *("on_request_finished", "on_schedule_end", "drain_jobs", "shutdown"),
]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """VLLM calls each method of the tier on a thread of its own; what is called."""
    called: list[str] = []

    def elsewhere(name: str) -> Callable[..., Any]:
        method = getattr(LmcacheCoreTier, name)

        def call(*arguments: Any) -> Any:
            called.append(name)
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(method, *arguments).result(PATIENCE)

        return call

    for name in CALLS:
        monkeypatch.setattr(LmcacheCoreTier, name, elsewhere(name))
    return called


def test_methods_that_are_called_on_any_thread(
    store: dict[str, Any], opened: Open, threads: list[str]
) -> None:
    """Since vLLM 0.33 one after the other, and not always on the same one."""
    blocks = content(6, 8192)
    first = opened(store)
    first.store(blocks)
    flush(first)
    second = opened(store)
    assert same(second.find(list(blocks)), blocks)
    second.core.weights = b"others"
    second.reset()
    assert second.find(list(blocks)) == {}
    second.core.weights = b"some"
    second.reset()
    assert same(second.find(list(blocks)), blocks)
    assert {*threads, "shutdown"} == set(CALLS)


def test_a_chunk_is_found_wherever_others_are_missing(store: dict[str, Any], opened: Open) -> None:
    """As layers with a sliding window ask: from the end."""
    blocks, unknown = content(2, 8192), content(2, 1)
    first = opened(store)
    first.store(blocks)
    flush(first)
    second = opened(store)
    with second.request() as context:
        for key in [*unknown, *blocks]:
            assert second.manager.lookup(key, context) is LookupResult.RETRY
        eventually(
            lambda: (
                (second.step(), second.manager.lookup(next(iter(unknown)), context))[1]
                is LookupResult.MISS
            )
        )
        for key in blocks:
            assert second.manager.lookup(key, context) is LookupResult.HIT_PENDING
        second.step()
        second.until_idle()
    assert same(second.find(list(blocks)), blocks)


def test_requests_that_come_together(store: dict[str, Any], opened: Open) -> None:
    some, others = content(3, 8192), content(3, 8192)
    first = opened(store)
    first.store(some)
    first.store(others)
    flush(first)
    second = opened(store, rows=4)  # too few for both
    with second.request() as one, second.request() as two:
        for _ in range(50):
            for key, context in [*((k, one) for k in some), *((k, two) for k in others)]:
                second.manager.lookup(key, context)
            second.step()
        second.until_idle()
    assert same(second.find(list(some)), some)
    assert same(second.find(list(others)), others)


def test_what_was_used_together_leaves_leaf_first(opened: Open, tmp_path: Path) -> None:
    """Also where a long prompt is offloaded in several steps."""
    tier = {"tiers": [{"backend": "disk", "path": str(tmp_path / "kv"), "capacity": "90KiB"}]}
    offloading = opened(tier, rows=4)
    blocks = content(8, 8192)
    keys = list(blocks)
    with offloading.request() as context:
        for begin in range(0, 8, 2):
            part = keys[begin : begin + 2]
            prepared = offloading.manager.prepare_store(part, context)
            for key, row in zip(part, prepared.store_spec.chunk_ids, strict=True):
                offloading._rows()[row, :] = blocks[key]
            offloading.manager.complete_store(part, context)
            offloading.until_idle()
    flush(offloading)
    for _ in range(5):
        offloading.store(content(1, 8192))
        flush(offloading)
    found = opened(tier).find(keys)
    assert 2 <= len(found) < 8
    assert same(found, {key: blocks[key] for key in keys[: len(found)]})


# Faults


def test_a_damaged_frame_is_a_miss_and_what_stands_before_it_is_not(
    disk: dict[str, Any], opened: Open, tmp_path: Path
) -> None:
    blocks = content(5, 8192)
    keys = list(blocks)
    first = opened(disk)
    first.store(blocks)
    flush(first)
    (bad,) = first.tier._rows._rows.keys([keys[2]])
    (file,) = (tmp_path / "kv").glob(f"chunks/*/*{str(bad)[32:]}*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    second = opened(disk)
    assert same(second.find(keys), {key: blocks[key] for key in keys[:2]})
    second.store({keys[2]: blocks[keys[2]]})  # computed, offloaded: whole again
    flush(second)
    assert same(opened(disk).find(keys), blocks)


def test_a_store_that_dies_and_comes_back(
    redis: tuple[dict[str, Any], Server], opened: Open
) -> None:
    tier, server = redis
    blocks = content(4, 8192)
    offloading = opened(tier)
    offloading.store(blocks)
    flush(offloading)
    offloading.forget()
    flush(offloading)
    server.kill()
    assert offloading.find(list(blocks)) == {}
    offloading.store(blocks)
    offloading.forget()
    assert offloading.find(list(blocks)) == {}
    server.start()

    def back() -> bool:
        more = content(2, 8192)
        offloading.store(more)
        flush(offloading)
        offloading.forget()
        flush(offloading)
        return same(offloading.find(list(more)), more)

    eventually(back)


def test_a_store_that_dies_between_lookup_and_load(
    redis: tuple[dict[str, Any], Server], opened: Open
) -> None:
    tier, server = redis
    blocks = content(4, 8192)
    first = opened(tier)
    first.store(blocks)
    flush(first)
    second = opened(tier)
    with second.request() as context:

        def results() -> set[LookupResult]:
            answers = {second.manager.lookup(key, context) for key in blocks}
            if LookupResult.HIT_PENDING in answers:
                server.kill()
            second.step()
            return answers

        eventually(lambda: results() == {LookupResult.HIT_PENDING})
        eventually(lambda: results() == {LookupResult.MISS})
        for _ in range(5):  # and stays one: the request is computed
            assert results() == {LookupResult.MISS}
    assert not second.manager.has_pending_work()


def test_nothing_waits_for_a_store_that_hangs(
    redis: tuple[dict[str, Any], Server], opened: Open
) -> None:
    tier, server = redis
    blocks = content(3, 8192)
    first = opened(tier)
    first.store(blocks)
    flush(first)
    second = opened(tier)
    server.freeze()
    with second.request() as context:
        for _ in range(3):  # each returns before the store has answered
            assert {second.manager.lookup(k, context) for k in blocks} == {LookupResult.RETRY}
            second.step()
    second.store(content(3, 8192))
    server.thaw()
    assert same(second.find(list(blocks)), blocks)


# Whose KV it is


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"block_size": 64},
        {"hf_overrides": {"rope_theta": 5000.0}},
        {"prefix_caching_hash_algo": "sha256_cbor"},
        {"tensor_parallel_size": 2},
    ],
    ids=str,
)
def test_other_settings_share_nothing(
    disk: dict[str, Any], opened: Open, llama: Path, options: dict[str, Any]
) -> None:
    blocks = content(2, 8192)
    one = opened(disk)
    one.store(blocks)
    flush(one)
    other = opened(disk, vllm_config(llama, **options))
    assert other.tier._rows is not None  # it is on, and finds nothing
    assert other.find(list(blocks)) == {}
    assert same(opened(disk).find(list(blocks)), blocks)


def test_another_dtype_of_the_cache_shares_nothing(
    disk: dict[str, Any], opened: Open, llama: Path
) -> None:
    blocks = content(2, 8192)
    one = opened(disk)
    one.store(blocks)
    flush(one)
    config = vllm_config(llama)
    config.cache_config.cache_dtype = "bfloat16"  # vLLM 0.33 takes none but the model's here
    other = opened(disk, config)
    assert other.tier._rows is not None  # it is on, and finds nothing
    assert other.find(list(blocks)) == {}
    assert same(opened(disk).find(list(blocks)), blocks)


def test_other_weights_share_nothing_and_a_path_says_nothing(
    disk: dict[str, Any], opened: Open, llama: Path, tmp_path: Path
) -> None:
    blocks = content(2, 8192)
    one = opened(disk)
    one.store(blocks)
    flush(one)
    assert opened(disk, weights=b"other").find(list(blocks)) == {}
    shutil.copytree(llama, tmp_path / "elsewhere")
    elsewhere = vllm_config(tmp_path / "elsewhere", revision="main")
    assert same(opened(disk, elsewhere).find(list(blocks)), blocks)


def test_weights_that_change_share_nothing_and_find_their_own_when_they_are_back(
    disk: dict[str, Any], opened: Open
) -> None:
    blocks, later = content(2, 8192), content(2, 8192)
    offloading = opened(disk)
    offloading.store(blocks)
    flush(offloading)
    offloading.core.weights = b"other"
    offloading.core.lmcache_core += 1
    offloading.store(later)  # vLLM's own memory is not reset: whose blocks these are nobody knows
    offloading.forget()
    assert offloading.find([*blocks]) == offloading.find([*later]) == {}
    offloading.reset()
    offloading.store(later)
    offloading.forget()
    assert same(offloading.find([*later]), later)
    assert offloading.find([*blocks]) == {}
    flush(offloading)
    offloading.core.weights = b"some"
    offloading.reset()
    assert same(offloading.find([*blocks]), blocks)
    assert offloading.find([*later]) == {}


# What cannot be


@pytest.mark.parametrize(
    ("tier", "cause"),
    [
        ({"tiers": [{"backend": "disk", "path": "/proc/no", "capacity": "1GiB"}]}, "/proc/no"),
        ({"tiers": [{"backend": "redis", "url": "http://x"}]}, "url"),
        ({"tires": []}, "tires"),
        ({"config_file": "/no/such.yaml"}, "/no/such.yaml"),
        ({"config_file": "/no/such.yaml", "tiers": []}, "either config_file or"),
        ({"tiers": [{"backend": "local_cpu", "capacity": "8000B"}]}, "capacity"),
        ({"tiers": [{"backend": "local_cpu", "capacity": "1MiB", "serde": ["int8"]}]}, "int8"),
    ],
)
def test_a_config_that_cannot_be_is_a_log_line_or_an_error_if_strict(
    tier: dict[str, Any], cause: str, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = content(3, 8192)
    with caplog.at_level(logging.WARNING, "vllm.lmcache_core"):
        offloading = opened(tier)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "vllm.lmcache_core"]
    assert line.startswith("lmcache-core is off")
    assert cause in line
    offloading.store(blocks)
    assert same(offloading.find(list(blocks)), blocks)  # vLLM's own rows go on
    offloading.forget()
    assert offloading.find(list(blocks)) == {}
    offloading.manager.reset_cache()
    with pytest.raises(ConfigError, match=cause):
        opened({**tier, "strict": True})


@pytest.mark.parametrize("job", ["load", "store"])
def test_where_no_thread_can_be_had_vllm_goes_on_without_it(
    job: str, disk: dict[str, Any], opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    blocks, before = content(3, 8192), set(threading.enumerate())
    with no_more_threads(f"lmcache-vllm-{job}"):
        offloading = opened(disk)
        offloading.store(blocks)
        assert same(offloading.find(list(blocks)), blocks)
        with pytest.raises(RuntimeError, match="thread"):
            opened({**disk, "strict": True})
    assert caplog.text.count("lmcache-core is off") == 1
    after = {thread.name for thread in set(threading.enumerate()) - before}
    assert not any(name.startswith("lmcache") for name in after)


def test_strict_wants_a_store_that_answers(opened: Open) -> None:
    tier = {"tiers": [{"backend": "redis", "url": f"redis://127.0.0.1:{free_port()}"}]}
    assert opened(tier).find(list(content(1, 1))) == {}
    with pytest.raises(ConfigError, match="does not answer"):
        opened({**tier, "strict": True})


def test_lora_is_refused_for_its_files_are_in_no_key(
    disk: dict[str, Any], opened: Open, llama: Path
) -> None:
    config = vllm_config(llama)
    config.lora_config = LoRAConfig(max_lora_rank=8)
    with pytest.raises(ConfigError, match="LoRA"):
        opened({**disk, "strict": True}, config)


def test_it_closes_whole(disk: dict[str, Any], config: VllmConfig) -> None:
    offloading = Offloading(config, disk)
    region = Path(offloading.spec._scheduler_mmap.mmap_path)
    offloading.store(content(3, 8192))
    assert region.exists()
    offloading.close()
    offloading.tier.shutdown()  # again, harmlessly
    assert offloading.spec._scheduler_mmap.mmap_obj is None
    assert not region.exists()


def test_vllm_finds_it_by_name_and_by_module() -> None:
    by_name = SecondaryTierFactory.get_tier_class({"type": "LmcacheCoreTier"})
    entry = {"type": "LmcacheCoreTier", "module_path": "lmcache_connectors.vllm.tier"}
    assert by_name is SecondaryTierFactory.get_tier_class(entry) is LmcacheCoreTier


# In real engines


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 512), k=length)


def answers(llm: Any, *prompts: list[int]) -> list[tuple[list[int], int]]:
    """(tokens, how many of the prompt's were not computed) of each."""
    outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], GREEDY, use_tqdm=False)
    return [(list(out.outputs[0].token_ids), out.num_cached_tokens) for out in outs]


def settled(llm: Any) -> None:
    """All that was computed is offloaded, and stored by us."""
    manager = llm.llm_engine.engine_core.engine_core.scheduler.connector.scheduler.manager
    answers(llm, prompt(BLOCK // 2, 99))  # vLLM offloads in the step that follows
    eventually(lambda: (answers(llm, prompt(BLOCK // 2, 99)), not manager.has_pending_work())[1])
    (tier,) = manager.secondary_tiers
    assert tier._rows is None or tier._rows._cache.flush(20)


def test_a_later_engine_reuses_what_vllm_offloaded(
    llama: Path, redis: tuple[dict[str, Any], Server]
) -> None:
    store, _ = redis
    one, two = prompt(300), [*prompt(300)[:250], *prompt(60, 1)]
    with engine(llama) as llm:
        cold = [answers(llm, ids)[0][0] for ids in (one, two)]
    with engine(llama, kv_transfer_config=transfer(store)) as llm:
        assert answers(llm, one) == [(cold[0], 0)]
        settled(llm)
    with engine(llama, kv_transfer_config=transfer(store)) as llm:
        assert answers(llm, two) == [(cold[1], 250 // BLOCK * BLOCK)]
        assert answers(llm, one) == [(cold[0], 299 // BLOCK * BLOCK)]


def test_a_model_of_several_kinds_of_layers(gemma: Path, disk: dict[str, Any]) -> None:
    """VLLM offloads the last window of each prompt only, so the prompt itself is what comes back."""
    ids = prompt(300)
    with engine(gemma) as llm:
        cold = answers(llm, ids)[0][0]
    with engine(gemma, kv_transfer_config=transfer(disk)) as llm:
        assert answers(llm, ids) == [(cold, 0)]
        settled(llm)
    with engine(gemma, kv_transfer_config=transfer(disk)) as llm:
        assert answers(llm, ids) == [(cold, 299 // BLOCK * BLOCK)]


def test_an_engine_in_a_process_of_its_own(
    llama: Path, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(200)
    with engine(llama, kv_transfer_config=transfer(disk)) as llm:
        cold = answers(llm, ids)[0][0]
        settled(llm)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with engine(llama, kv_transfer_config=transfer(disk)) as llm:
        assert answers(llm, ids) == [(cold, 199 // BLOCK * BLOCK)]


def test_another_model_in_the_same_store_shares_nothing(
    llama: Path, tmp_path: Path, disk: dict[str, Any]
) -> None:
    ids = prompt(200)
    other = saved(AutoConfig.from_pretrained(llama), tmp_path / llama.name, seed=1)
    with engine(other) as llm:
        plain = answers(llm, ids)
    with engine(llama, kv_transfer_config=transfer(disk)) as llm:
        assert answers(llm, ids) != plain
        settled(llm)
    with engine(other, kv_transfer_config=transfer(disk)) as llm:
        assert answers(llm, ids) == plain


def test_an_engine_with_a_wrong_config_serves_or_does_not_start_if_strict(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids, wrong = prompt(100), {"tiers": [{"backend": "redis", "url": "http://x"}]}
    with engine(llama) as llm:
        plain = answers(llm, ids)
    with engine(llama, kv_transfer_config=transfer(wrong)) as llm:
        assert answers(llm, ids) == plain
        settled(llm)
    assert "lmcache-core is off" in caplog.text
    strict = engine(llama, kv_transfer_config=transfer({**wrong, "strict": True}))
    with pytest.raises(Exception, match="url"), contextlib.ExitStack() as stack:
        stack.enter_context(strict)
    ensure_kv_transfer_shutdown()  # the worker's side, which vLLM leaves behind


def test_an_engine_outlives_its_store(llama: Path, redis: tuple[dict[str, Any], Server]) -> None:
    tier, server = redis
    ids = prompt(400)
    with engine(llama) as llm:
        plain = answers(llm, ids)[0][0]
    with engine(llama, kv_transfer_config=transfer(tier)) as llm:
        answers(llm, ids)
        settled(llm)
    with engine(llama, kv_transfer_config=transfer(tier)) as llm:
        server.kill()
        assert answers(llm, ids) == [(plain, 0)]
        settled(llm)
