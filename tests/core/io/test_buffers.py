"""Parts: bytes as buffers that follow each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_core.backend import concat, split_at

PARTS = st.lists(st.binary(max_size=9).map(memoryview), max_size=6)


@given(PARTS)
def test_joined_is_all_of_it_and_no_copy_of_a_single_part(parts: list[memoryview]) -> None:
    whole = concat(parts)
    assert whole == b"".join(parts)
    filled = [part for part in parts if part.nbytes]
    assert len(filled) != 1 or whole is filled[0]


@given(PARTS, st.integers(0, 60))
def test_cut_takes_the_first_bytes_and_leaves_the_rest(parts: list[memoryview], n: int) -> None:
    data = b"".join(parts)
    if n > len(data):
        with pytest.raises(ValueError, match=f"ends {n - len(data)} bytes early"):
            split_at(parts, n)
        return
    head, rest = split_at(parts, n)
    assert (bytes(head), b"".join(rest)) == (data[:n], data[n:])
    assert all(any(part.obj is whole.obj for whole in parts) for part in rest)  # nothing is copied
