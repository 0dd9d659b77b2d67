"""Two workers, each with half of the KV heads: what is stored of a prompt are chunks of both."""

from __future__ import annotations

import glob
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_backends.shm import main as shm
from lmcache_backends.shm.backend import ShmBackend, ShmOptions
from lmcache_core.backend import Transfer
from tests.e2e.vllm.conftest import BLOCK, engine
from tests.e2e.vllm.processes import PATIENCE, environment, run, said
from tests.e2e.vllm.test_connector import answers, prompt

pytestmark = pytest.mark.timeout(3 * PATIENCE)

SCRIPT = """
import json, os, sys, threading
from vllm import LLM, SamplingParams

def cores(worker):
    return {each.name: sorted(os.sched_getaffinity(each.native_id))
            for each in threading.enumerate()}

def watch(worker):
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    moving = get_kv_transfer_group()._worker
    report, moving.told = moving.report, []
    def tell(step):
        said = report(step)
        moving.told.extend(said.loads)
        return said
    moving.report = tell

def loads(worker):
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    return [tokens for tier, tokens, seconds in get_kv_transfer_group()._worker.told]

def move(worker, by):
    if worker.rank == 1:
        worker.get_model().model.layers[1].input_layernorm.weight.data[-1] += by

settings, prompt = json.loads(sys.argv[1])
llm = LLM(**settings)
sampling = SamplingParams(temperature=0, max_tokens=12, detokenize=False)
llm.collective_rpc(watch)
answers = []
for by in (None, None, 0.5, -0.5):
    if by:
        llm.collective_rpc(move, args=(by,))
    out = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
    answers.append([out.num_cached_tokens, list(out.outputs[0].token_ids)])
    assert llm.reset_prefix_cache()
print("said:", json.dumps([answers, llm.collective_rpc(cores), llm.collective_rpc(loads)]))
"""
IDS = prompt(400)
REUSED = 399 // BLOCK * BLOCK


@pytest.fixture(autouse=True)
def _memory_of_ranks() -> Iterator[None]:
    """vLLM leaves behind the shared memory through which its ranks speak."""
    before = set(glob.glob("/dev/shm/vllm_dist_*"))
    yield
    for path in set(glob.glob("/dev/shm/vllm_dist_*")) - before:
        os.unlink(path)


@pytest.fixture
def pool() -> Iterator[dict[str, Any]]:
    """A tier that all processes share."""
    name = f"tp-{secrets.token_hex(4)}"
    yield {"backend": "shm", "pool": name, "capacity": "64MiB"}
    shm(["clear", name])


def test_two_ranks(llama: Path, tmp_path: Path, pool: dict[str, Any]) -> None:
    extra = {"chunk_size": BLOCK, "tiers": [pool]}
    settings = {
        "model": str(llama), "skip_tokenizer_init": True, "enforce_eager": True, "block_size": BLOCK,
        "dtype": "float32", "max_model_len": 1024, "tensor_parallel_size": 2,
        "kv_transfer_config": {
            "kv_connector": "LmcacheCoreConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        },
    }  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))[:2]
    env = environment(
        tmp_path,
        VLLM_CPU_OMP_THREADS_BIND="|".join(map(str, cores)),
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to ask the ranks for their threads
    )

    asked = json.dumps([settings, IDS])
    said_all, threads, booked = said(run(tmp_path, SCRIPT, asked, env=env))
    for core, rank in zip(cores, threads, strict=True):
        assert rank["MainThread"] == [core]  # computes there; what is ours runs beside it
        ours = [where for thread, where in rank.items() if thread.startswith("lmcache-")]
        assert ours
        assert all(where == sorted(os.sched_getaffinity(0)) for where in ours)
    (cold, tokens), warm, moved, back = said_all
    assert (cold, warm) == (0, [REUSED, tokens])
    assert moved[0] == 0  # what one rank holds is part of what all of them compute
    assert back == warm
    assert booked == [[REUSED] * 2, []]  # loads in which both took part
    assert sorted(chunks(pool).values()) == [400 // BLOCK] * 4  # of each rank, of both weights
    with engine(llama, extra) as llm:  # one rank, with all heads
        assert answers(llm, IDS) == [(tokens, 0)]
    assert sorted(chunks(pool).values()) == [400 // BLOCK] * 5


def chunks(pool: dict[str, Any]) -> Counter[bytes]:
    """How many a pool has of each namespace."""
    backend = ShmBackend(ShmOptions(pool=pool["pool"], capacity=pool["capacity"]))
    try:
        return Counter(stored.key.namespace for stored in backend.scan(Transfer(10.0)))
    finally:
        backend.close()
