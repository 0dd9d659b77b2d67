"""The longest usable prefix, against a definition that tries every length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_core.connector import Row, chunk_ends, first_kept, longest

CHUNK = 4


@st.composite
def rows_and_ends(draw: st.DrawFn) -> tuple[list[Row], list[int], int]:
    tokens = draw(st.integers(0, 6)) * CHUNK
    ends = chunk_ends(0, tokens, CHUNK)
    rows = [
        Row(
            draw(st.lists(st.sampled_from([0, 1, None]), min_size=len(ends), max_size=len(ends))),
            draw(st.sampled_from([None, 1, 3, 5, 9])),
            draw(st.sampled_from([1, 2, 4])),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]
    return rows, ends, draw(st.integers(0, tokens))


def serves(rows: list[Row], ends: list[int], count: int, usable: int) -> bool:
    """Whether every group has what computing needs that goes on after `count` chunks."""
    tokens = min(ends[count - 1], usable) if count else 0
    return all(
        tier is not None
        for row in rows
        for end, tier in zip(ends[:count], row.tiers, strict=False)
        if row.window is None or end > first_kept(tokens, row.window, row.block)
    )


@given(rows_and_ends())
def test_it_is_the_longest_that_every_group_can_serve(
    case: tuple[list[Row], list[int], int],
) -> None:
    rows, ends, usable = case
    expected = max(n for n in range(len(ends) + 1) if serves(rows, ends, n, usable))
    assert longest(rows, ends, usable) == expected


def test_a_hole_ends_it_for_groups_that_attend_to_everything() -> None:
    assert longest([Row([0, None, 0], None, 4)], [4, 8, 12], 11) == 1


def test_a_window_needs_only_what_it_reaches() -> None:
    full, window = Row([0, 0, 0], None, 4), Row([None, None, 1], 3, 4)
    assert longest([full, window], [4, 8, 12], 12) == 3


def test_no_group_no_limit_but_the_chunks() -> None:
    assert longest([], [4, 8], 8) == 2
    assert longest([], [], 0) == 0


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9))
def test_chunks_cover_what_they_are_asked_for(begin: int, end: int, chunk: int) -> None:
    ends = chunk_ends(begin, end, chunk)
    assert ends == sorted(set(ends))
    if begin < end:
        assert ends[-1] == end
        assert all(e % chunk == 0 for e in ends[:-1])
        assert begin < ends[0] <= begin - begin % chunk + chunk
    else:
        assert ends == []


@pytest.mark.parametrize(
    ("begin", "end", "ends"),
    [
        (0, 0, []),
        (0, 1, [1]),
        (0, 4, [4]),
        (0, 9, [4, 8, 9]),
        (3, 9, [4, 8, 9]),
        (4, 8, [8]),
        (5, 6, [6]),
    ],
)
def test_ends_of_chunks(begin: int, end: int, ends: list[int]) -> None:
    assert chunk_ends(begin, end, 4) == ends
