"""LRU in which a leaf always leaves before its root."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from lmcache_core import LRU, ChunkKey


def key(*path: int) -> ChunkKey:
    """The chunk at the end of a path from a root."""
    return ChunkKey(bytes(path).ljust(32, b"\xff"))


def chain(*path: int) -> list[ChunkKey]:
    return [key(*path[: n + 1]) for n in range(len(path))]


def order(policy: LRU[int]) -> list[ChunkKey]:
    """Keys as they are evicted."""
    out = []
    while (victim := policy.victim(keep=())) is not None:
        policy.remove(victim)
        out.append(victim)
    return out


def used(policy: LRU[int], path: tuple[int, ...]) -> None:
    for step in chain(*path):
        if policy.get(step) is None:
            policy.add(step, 1)
    policy.touch(chain(*path))


paths = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)


@given(st.lists(paths, max_size=20))
def test_no_chunk_outlives_its_parent(history: list[tuple[int, ...]]) -> None:
    policy: LRU[int] = LRU()
    for path in history:
        used(policy, path)
    evicted = order(policy)
    place = {k: n for n, k in enumerate(evicted)}
    for path in history:
        steps = chain(*path)
        for parent, child in itertools.pairwise(steps):
            assert place[child] < place[parent]


def test_the_sequence_used_longest_ago_leaves_first() -> None:
    policy: LRU[int] = LRU()
    for path in ((1, 1), (2, 2), (3, 3)):
        used(policy, path)
    policy.touch(chain(1, 1))
    assert order(policy) == [key(2, 2), key(2), key(3, 3), key(3), key(1, 1), key(1)]


def test_what_must_stay_is_passed_over() -> None:
    policy: LRU[int] = LRU()
    used(policy, (1,))
    used(policy, (2,))
    assert policy.victim(keep={key(1)}) == key(2)
    assert policy.victim(keep={key(1), key(2)}) is None
    assert list(policy) == [key(1), key(2)]
