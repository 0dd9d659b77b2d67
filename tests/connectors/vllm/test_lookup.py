"""How far a prefix is stored, over all groups of all ranks. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lmcache_connectors.vllm.chunks import Group
from lmcache_connectors.vllm.lookup import Found, Lookup
from lmcache_core import ChunkKey, KVLayout, LayerGroup, Namespace, unverified

BLOCK, CHUNK = 4, 16
HASHES = [bytes([n]) * 32 for n in range(20)]
"""One a block."""


def group(rank: int, number: int, window: int | None = None) -> Group:
    layer = LayerGroup(
        kind="opaque", layers=(number,), kv_heads=1, key_dim=1, value_dim=0, dtype="uint8"
    )
    layout = KVLayout(groups=(layer,))
    name = Namespace(model="m", weights=unverified("w"), layout=layout, rank=rank, world=2)
    return Group(name, BLOCK, window)


class Store:
    """Tiers that have some chunks of some groups."""

    def __init__(self, *ranks: Sequence[Group]) -> None:
        self._ranks = ranks
        self._tiers: dict[ChunkKey, int] = {}
        self.asked: list[int] = []
        """How many keys, by question."""

    def put(self, rank: int, number: int, *ends: int, tier: int = 0, salt: str = "") -> None:
        """The chunks of a group that end there, in tokens."""
        hashes = [HASHES[end // BLOCK - 1] for end in ends]
        keys = self._ranks[rank][number].keys(hashes, salt)
        self._tiers.update(dict.fromkeys(keys, tier))

    def put_everywhere(self, *ends: int) -> None:
        for rank, groups in enumerate(self._ranks):
            for number in range(len(groups)):
                self.put(rank, number, *ends)

    def find(self, tokens: int, usable: int | None = None, salt: str = "") -> Found:
        """Of a prompt whose first `tokens` are hashed."""
        lookup = Lookup(self._ranks, self._where, chunk=CHUNK, hashed=BLOCK, unit=BLOCK)
        return lookup.find(HASHES[: tokens // BLOCK], tokens if usable is None else usable, salt)

    def _where(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        self.asked.append(len(keys))
        return [self._tiers.get(key) for key in keys]


def test_a_hit_is_what_every_group_of_every_rank_has() -> None:
    store = Store([group(0, 0), group(0, 1)], [group(1, 0), group(1, 1)])
    store.put(0, 0, 16, 32, 48)
    store.put(0, 1, 16, 32, 48)
    store.put(1, 0, 16, 32, 48)
    store.put(1, 1, 16, 48)
    assert store.find(64).tokens == 16
    store.put(1, 1, 32)
    assert store.find(64).tokens == 48


def test_a_short_chunk_may_end_it() -> None:
    store = Store([group(0, 0)], [group(1, 0)])
    store.put_everywhere(16, 24)
    assert store.find(64)[:2] == (24, 64)
    assert store.find(64).ends == [16, 24]
    store.put(0, 0, 28)  # one rank's only
    assert store.find(64).tokens == 24
    store.put(1, 0, 28)
    assert store.find(64).ends == [16, 28]
    assert store.find(24).ends == [16, 24]  # no longer than the prompt


def test_a_short_chunk_of_old_is_no_hit_without_what_is_before_it() -> None:
    store = Store([group(0, 0)])
    store.put_everywhere(24)
    assert store.find(64).tokens == 0


def test_it_says_who_has_what() -> None:
    store = Store([group(0, 0)], [group(1, 0)])
    store.put(0, 0, 16, tier=1)
    store.put(0, 0, 32, tier=2)
    store.put(0, 0, 36, tier=1)
    store.put(1, 0, 16, 32, 36, tier=0)
    found = store.find(64)
    assert found.ends == [16, 32, 36]
    assert found.tiers == [[[1, 2, 1]], [[0, 0, 0]]]


def test_a_window_needs_what_it_reaches_and_no_more() -> None:
    store = Store([group(0, 0), group(0, 1, window=8)])
    store.put(0, 0, 16, 32, 48)
    store.put(0, 1, 48)
    assert store.find(64).tokens == 48
    store = Store([group(0, 0), group(0, 1, window=20)])  # into the chunk before
    store.put(0, 0, 16, 32, 48)
    store.put(0, 1, 16, 48)
    assert store.find(64).tokens == 16


def test_what_depends_on_something_else_is_not_found() -> None:
    store = Store([group(0, 0)])
    store.put(0, 0, 16, 32, salt="an adapter")
    assert store.find(64).tokens == 0
    assert store.find(64, salt="an adapter").tokens == 32
    assert store.find(64, salt="another").tokens == 0


def test_all_is_asked_in_two_questions() -> None:
    store = Store([group(0, n) for n in range(3)], [group(1, n) for n in range(3)])
    store.put_everywhere(16, 32)
    store.find(64)
    assert store.asked == [6 * 4, 6 * 3]  # whole chunks, then the short ones of the next


def test_where_nobody_is_asked_nothing_is_found() -> None:
    """While nobody can tell what the workers compute with."""
    assert Store().find(64).tokens == 0


@given(st.sets(st.integers(1, 16)), st.integers(0, 16))
def test_of_one_group_it_is_whole_chunks_and_the_longest_short_one(
    blocks: set[int], length: int
) -> None:
    ends = {block * BLOCK for block in blocks}
    store = Store([group(0, 0)])
    store.put(0, 0, *ends)
    tokens = length * BLOCK
    whole = 0
    while whole + CHUNK <= tokens and whole + CHUNK in ends:
        whole += CHUNK
    short = [end for end in ends if whole < end < whole + CHUNK and end <= tokens]
    # A short chunk that ends the prompt is asked for with the whole ones.
    assert store.find(tokens).tokens == max(short, default=whole)
