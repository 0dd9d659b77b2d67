"""Chunks of blocks: which are moved, and under what keys. Needs no vLLM."""

from __future__ import annotations

import pytest

from lmcache_connectors.vllm.chunks import Chunks, all_or_nothing
from tests.connectors.vllm.test_lookup import HASHES, group

CHUNK, BLOCK = 16, 4


def chunks(begin: int, end: int, ids: list[int], ends: list[int]) -> Chunks:
    return Chunks("a", "", ends, HASHES[: len(ends)], begin, end, (ids,))


@pytest.mark.parametrize(
    ("begin", "ids", "first"),
    [
        (0, [5, 6, 7], 0),
        (8, [5, 6, 7], 2),
        (0, [0, 0, 7], 2),  # a window has left two
        (4, [0, 0, 7], 2),
        (0, [0, 0, 0], 3),
    ],
)
def test_blocks_that_a_window_has_left_are_not_moved(
    begin: int, ids: list[int], first: int
) -> None:
    assert chunks(begin, 12, ids, [12]).first_block(0, BLOCK) == first


def test_a_token_lies_in_the_chunk_that_ends_behind_it() -> None:
    some = chunks(0, 40, [], [16, 32, 40])
    assert [some.place(token) for token in (0, 15, 16, 31, 32, 39)] == [0, 0, 1, 1, 2, 2]
    assert [some.start(place, CHUNK) for place in range(3)] == [0, 16, 32]


def test_a_load_must_come_whole_where_blocks_are_missing_in_between() -> None:
    assert not all_or_nothing([None])
    assert all_or_nothing([64])
    assert all_or_nothing([None, 64])


def test_keys_depend_on_the_group_the_rank_and_the_salt() -> None:
    one = group(0, 0)
    keys = {one.keys(HASHES[:1], salt)[0] for salt in ("", "an adapter", "another")}
    keys |= {other.keys(HASHES[:1], "")[0] for other in (group(1, 0), group(0, 1))}
    assert len(keys) == 5
    assert one.keys(HASHES[:1], "") == group(0, 0).keys(HASHES[:1], "")
