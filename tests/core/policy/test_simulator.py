"""The simulator counts what an engine counts, and reads what people have."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

import lmcache_core
from lmcache_core import ChunkKey, ConfigError, unverified
from lmcache_core.policy import traces
from lmcache_core.policy.auto import Auto
from lmcache_core.policy.lru import LRU
from lmcache_core.policy.named import eviction_policy
from lmcache_core.policy.simulator import Simulator, curve
from lmcache_core.testing import tiny_layout

CHUNK = 4


def chats(seed: int, requests: int) -> list[list[int]]:
    """Prompts of chats that go on for a while, behind one of three system prompts."""
    chance = random.Random(seed)
    open_chats: list[list[int]] = []
    prompts = []
    for _ in range(requests):
        if open_chats and chance.random() < 0.6:
            chat = chance.choice(open_chats[-20:])
        else:
            chat = [chance.randrange(3)] * 3 * CHUNK
            open_chats.append(chat)
        chat += [chance.randrange(1000) for _ in range(CHUNK * chance.randrange(1, 8) + 1)]
        prompts.append(list(chat))
    return prompts


@pytest.mark.parametrize("policy", ["lru", "auto"])
@pytest.mark.parametrize("chunks", [20, 100, 400])
def test_it_counts_what_the_engine_counts_request_by_request(policy: str, chunks: int) -> None:
    layout = tiny_layout()
    frame = _frame_bytes(layout)
    capacity = chunks * frame + frame // 2
    tier = {"backend": "local_cpu", "capacity": capacity, "eviction": policy}
    simulator = Simulator(capacity, eviction_policy(policy, capacity), frame)
    with lmcache_core.open({"chunk_size": CHUNK, "tiers": [tier]}) as cache:
        namespace = cache.namespace(model="m", layout=layout, weights=unverified("test"))
        hits = 0
        for prompt in chats(1, 400):
            keys = cache.keys(namespace, prompt)
            got = sum(1 for _ in cache.load(cache.lookup(keys)))
            cache.store(namespace, keys, lambda index, out: [t.zero_() for t in out.values()])
            assert simulator.request(keys) == got
            hits += got
        assert 0 < hits < simulator.outcome.chunks
        stored = cache.stats()["stored", "local_cpu"]
    assert simulator.outcome.written == stored * frame


def _frame_bytes(layout: lmcache_core.KVLayout) -> int:
    """Bytes of one chunk's frame in memory."""
    tier = {"backend": "local_cpu", "capacity": "1MiB"}
    with lmcache_core.open({"chunk_size": CHUNK, "tiers": [tier]}) as cache:
        return cache._tiers[0].raw_bytes(
            cache.namespace(model="m", layout=layout, weights=unverified("test")), CHUNK
        )


def test_a_curve_falls_nowhere_for_lru() -> None:
    sequences = [_keys(prompt) for prompt in chats(2, 300)]
    outcomes = curve(sequences, [10, 50, 200, 10_000], LRU)
    rates = [outcome.hit_rate for outcome in outcomes]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
    distinct = len({key for sequence in sequences for key in sequence})
    assert outcomes[-1].written == distinct
    assert outcomes[0].requests == 300


def test_a_scan_that_does_not_fit_has_hits_all_the_same() -> None:
    """A thousand prompts of one chunk in turn, in a store one chunk too small for them."""
    prompts = [[key(n)] for n in range(1000)]
    hits = {}
    for policy in (LRU, Auto):
        store = Simulator(999, policy(999))
        for prompt in prompts * 20:
            store.request(prompt)
        hits[policy] = store.outcome.hits
    assert hits[LRU] == 0
    assert hits[Auto] > 10_000


def test_a_prompt_larger_than_the_store_leaves_the_others_what_they_had() -> None:
    store = Simulator(100, Auto(100))
    prompts = [[key(n, depth) for depth in range(10)] for n in range(10)]
    for prompt in prompts:
        store.request(prompt)
    assert store.request([key(99, depth) for depth in range(150)]) == 0
    assert [store.request(prompt) for prompt in prompts] == [10] * 10


def key(*path: int) -> ChunkKey:
    return ChunkKey(hashlib.blake2b(repr(path).encode()).digest()[:32])


def _keys(prompt: list[int]) -> list[ChunkKey]:
    return traces._sequence({"token_ids": prompt}, CHUNK)


def test_traces_are_read_in_three_forms(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 0, "hash_ids": [0, 1, 2]},
        {"hash_ids": [0, 1, 3]},
        {"token_ids": [5, 6, 7, 8, 9]},
        {"token_ids": [5, 6, 7, 8]},
        {"keys": ["ab" * 32]},
        {"hash_ids": [0], "tenant": "other"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    read = list(traces.read(path, CHUNK))
    assert [len(sequence) for sequence in read] == [3, 3, 1, 1, 1, 1]
    assert read[0][:2] == read[1][:2]
    assert read[2] == read[3]
    assert read[4] == [ChunkKey(b"\xab" * 32)]
    assert read[5] != read[0][:1]
    assert read[5][0].namespace != read[0][0].namespace


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 3"),
        ("[]", "expected an object"),
        ('{"a": 1}', "hash_ids"),
        ('{"hash_ids": 5}', "expected a list"),
        ('{"hash_ids": ["a"]}', "line 3"),
        ('{"hash_ids": [-1]}', "line 3"),
        ('{"token_ids": [1.5]}', "token ids are integers"),
        ('{"keys": ["abc"]}', "line 3"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1]}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 3") as error:
        list(traces.read(path))
    assert says in str(error.value)
