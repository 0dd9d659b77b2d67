"""EvictionConformance: everything that an EvictionPolicy promises."""

from __future__ import annotations

import gc
import hashlib
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_core.kv.keys import ChunkKey
from lmcache_core.policy.eviction import EvictionPolicy, Hint
from lmcache_core.policy.index import Index

Path = tuple[int, ...]

_paths = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
_sizes = st.integers(1, 5)
_hints: st.SearchStrategy[Hint] = st.sampled_from(["done", "waiting", "once"])
_steps = st.one_of(
    st.tuples(st.just("request"), _paths, _sizes),
    st.tuples(st.just("interleaved"), _paths, _paths),
    st.tuples(st.just("used"), _paths, st.none()),
    st.tuples(st.just("touched"), _paths, st.none()),
    st.tuples(st.just("deleted"), _paths, st.none()),
    st.tuples(st.just("hint"), _paths, _hints),
)


def _examples(count: int) -> settings:
    """Of a test that several classes inherit, on a machine that may be slow."""
    checks = [HealthCheck.differing_executors, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, suppress_health_check=checks)


class EvictionConformance:
    """Subclass it, name it Test..., and define `policy`: your class, or what else makes one of a
    capacity in bytes."""

    policy: ClassVar[Any]
    bytes_a_chunk: ClassVar[int] = 300
    """Memory that the policy may take for each of 20,000 chunks, its key included."""

    def test_it_knows_what_is_there_and_how_large(self) -> None:
        policy = self.policy(1000)
        sequence = chain((1, 2, 3))
        for index, nbytes in enumerate((5, 7, 11)):
            assert sequence[index] not in policy
            policy.add(sequence, index, nbytes, nbytes)
            assert sequence[index] in policy
            assert policy.get(sequence[index]) == nbytes
        assert policy.get(key((9,))) is None
        assert set(policy) == set(sequence)
        assert (len(policy), policy.nbytes) == (3, 23)
        policy.remove(sequence[2])
        policy.remove(key((9,)))  # unknown ones are fine
        assert (len(policy), policy.nbytes) == (2, 12)
        assert sequence[2] not in policy

    def test_victims_make_the_room_that_was_asked_for_and_hardly_more(self) -> None:
        policy = self.policy(1000)
        sizes = {}
        for root in range(20):
            sequence = chain((root, 1))
            for index in range(2):
                sizes[sequence[index]] = 1 + root % 3
                policy.add(sequence, index, sizes[sequence[index]], 0)
        victims = policy.victims(7, ())
        assert sum(sizes[victim] for victim in victims[:-1]) < 7
        assert sum(sizes[victim] for victim in victims) >= 7
        assert not any(victim in policy for victim in victims)
        assert policy.nbytes == sum(sizes.values()) - sum(sizes[victim] for victim in victims)

    def test_what_is_to_be_kept_is_kept(self) -> None:
        policy = self.policy(1000)
        for root in range(5):
            for index in range(3):
                policy.add(chain((root, 1, 1)), index, 1, 0)
        keep = chain((2, 1, 1))
        assert set(policy.victims(100, keep)) == {
            each for root in (0, 1, 3, 4) for each in chain((root, 1, 1))
        }
        assert all(each in policy for each in keep)
        assert policy.victims(1, keep) == []
        assert policy.victims(100, ()) == keep[::-1]
        assert policy.victims(1, ()) == []
        assert (len(policy), policy.nbytes) == (0, 0)

    def test_what_was_deleted_is_no_victim_and_may_come_back(self) -> None:
        policy = self.policy(1000)
        sequence = chain((1, 2))
        for _ in range(3):
            for index in range(2):
                policy.add(sequence, index, 1, 0)
            policy.remove(sequence[1])
            assert policy.victims(5, ()) == [sequence[0]]

    @_examples(100)
    @given(st.lists(_steps, max_size=40), st.integers(4, 40))
    def test_leaves_leave_before_roots_whatever_happens(
        self, steps: list[tuple[str, Path, Any]], capacity: int
    ) -> None:
        store = _Store(self.policy(capacity), capacity)
        for step, path, what in steps:
            getattr(store, step)(path, what)
            store.check()
        there = set(store.index.policy)
        left = store.index.policy.victims(10 * capacity, ())
        assert (set(left), len(left)) == (there, len(there))
        places = {each: n for n, each in enumerate(left)}
        for each in left:
            parent = store.parents[each]
            assert parent is None or places[each] < places[parent]

    @_examples(10)
    @given(st.integers(0, 2**32), st.integers(20, 200))
    def test_leaves_leave_before_roots_in_a_long_run(self, seed: int, capacity: int) -> None:
        chance = random.Random(seed)
        store = _Store(self.policy(capacity), capacity)
        for _ in range(200):
            length = chance.randrange(1, 12)
            path = (0, *(int(chance.expovariate(1.0)) for _ in range(length)))
            store.request(path, 1)
            if chance.random() < 0.1:
                store.hint(path, chance.choice(("done", "waiting", "once")))
        store.check()

    def test_a_chunk_costs_the_same_whatever_is_stored(self) -> None:
        """Counted: how often its key, or another's, is hashed or compared."""
        few, many = (self._comparisons(chunks) for chunks in (256, 2048))
        assert many < 1.5 * few

    def _comparisons(self, chunks: int) -> float:
        """For each chunk of a sequence that is stored into a full store."""
        index: Index[None] = Index(2 * chunks, self.policy(2 * chunks))
        for root in range(2 * chunks):
            _request(index, [_Counted(key((root,)))], 1)
        sequence = [_Counted(each) for each in chain((1,) * chunks)]
        _Counted.seen = 0
        _request(index, sequence, 1)
        return _Counted.seen / chunks

    def test_memory_a_chunk(self) -> None:
        chunks = 20_000
        gc.collect()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        index: Index[None] = Index(chunks, self.policy(chunks))
        for number in range(4 * chunks // 20):
            sequence = chain((number,) * 20)
            _request(index, sequence, 1)
        del sequence
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(index) == chunks
        assert (after - before) / chunks < self.bytes_a_chunk


class _Store:
    """A store as backends keep it, that knows each chunk's parent."""

    def __init__(self, policy: EvictionPolicy[int], capacity: int) -> None:
        self.index: Index[int] = Index(capacity, policy)
        self.parents: dict[ChunkKey, ChunkKey | None] = {}

    def request(self, path: Path, nbytes: int) -> None:
        sequence = self._chain(path)
        _request(self.index, sequence, nbytes)

    def interleaved(self, path: Path, other: Path) -> None:
        """Two threads store at a time; neither has touched its sequence when it begins."""
        sequences = [self._chain(path), self._chain(other)]
        stores = [_put(self.index, sequence, 1) for sequence in sequences]
        for _ in range(max(map(len, sequences))):
            for store in stores:
                next(store, None)
                self.check()
        for sequence in sequences:
            self.index.policy.touched(sequence)

    def used(self, path: Path, _: None) -> None:
        sequence = self._chain(path)
        self.index.policy.used(sequence[: _hits(self.index, sequence)])

    def touched(self, path: Path, _: None) -> None:
        self.index.policy.touched(self._chain(path))

    def deleted(self, path: Path, _: None) -> None:
        each = key(path)
        if not any(self.parents[other] == each for other in self.index.policy):
            self.index.policy.remove(each)

    def hint(self, path: Path, hint: Hint) -> None:
        self.index.policy.hint(self._chain(path), hint)

    def check(self) -> None:
        policy = self.index.policy
        held = {each: policy.get(each) or 0 for each in policy}
        assert self.index.policy.nbytes == sum(held.values()) <= self.index.capacity
        assert len(self.index.policy) == len(held)
        for each in held:
            assert each in self.index.policy
            parent = self.parents[each]
            assert parent is None or parent in held, "a chunk has outlived its parent"

    def _chain(self, path: Path) -> list[ChunkKey]:
        sequence = chain(path)
        self.parents.update(zip(sequence, [None, *sequence], strict=False))
        return sequence


def _request(index: Index[Any], sequence: Sequence[ChunkKey], nbytes: int) -> None:
    hits = _hits(index, sequence)
    if hits:
        index.policy.used(sequence[:hits])
    for _ in _put(index, sequence, nbytes):
        pass
    index.policy.touched(sequence)


def _put(index: Index[Any], sequence: Sequence[ChunkKey], nbytes: int) -> Iterator[None]:
    """Store a sequence, chunk by chunk, as far as there is room and nobody evicts what it has."""
    parent = None
    for each in sequence:
        if parent is not None and parent not in index:
            return
        if each not in index and not index.add(sequence, each, nbytes, nbytes, []):
            return
        parent = each
        yield


def _hits(index: Index[Any], sequence: Sequence[ChunkKey]) -> int:
    return next((n for n, each in enumerate(sequence) if each not in index), len(sequence))


class _Counted(ChunkKey):
    """A key that counts what is done with it."""

    seen = 0

    def __hash__(self) -> int:
        _Counted.seen += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        _Counted.seen += 1
        return super().__eq__(other)


def key(path: Path) -> ChunkKey:
    """The chunk at the end of a path from a root."""
    return chain(path)[-1]


def chain(path: Path) -> list[ChunkKey]:
    """All chunks of a path, root first."""
    keys = []
    parent = b""
    for step in path:
        parent = _digest(parent + b"%d" % step)
        keys.append(ChunkKey(bytes(16) + parent))
    return keys


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
