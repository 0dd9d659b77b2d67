"""Filling: whether a gather has written every byte of the tensors that it was given.

Host buffers are used again, so what a gather leaves as it is belongs to another request. Clearing
each buffer first would cost a third of a copy. So `copy_exact` notes what it writes, and a gather
that is known to write all through it is spared that; each other one gets zeros, with marks in them.

What was written is compared with what there is to write by three sums over the addresses of bytes:
how many, their sum, the sum of their squares. They are the same where each byte was written once.
Where some were written twice in place of others they differ, unless it was arranged that they do
not: three pieces of one size at least, at distances that nobody comes to by mistake.
"""

from __future__ import annotations

import ctypes
import secrets
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch

from lmcache_core.kv.layout import Tensors

_now = threading.local()
"""The filling that goes on on a thread."""
_MARK = int.from_bytes(secrets.token_bytes(8), "little", signed=True)
"""Eight bytes that no tensor has by chance."""
_G = TypeVar("_G", bound=Callable[..., Any])


def whole(gather: _G) -> _G:
    """Say of a gather that it writes every byte of what it is given, whatever comes: nothing is
    cleared or checked. For those whose author can prove it; another request's KV is stored where
    it is not so."""
    gather.lmcache_whole = True  # type: ignore[attr-defined]
    return gather


def is_whole(gather: Callable[..., Any]) -> bool:
    """Whether `whole` was said of it."""
    return getattr(gather, "lmcache_whole", False)


class Filling:
    """What `copy_exact` writes into some tensors, on this thread, while this is entered."""

    def __init__(self, tensors: Tensors) -> None:
        self._places = [
            (each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors.values()
        ]
        self._left = [sum(sums) for sums in zip(*map(_sums, tensors.values()), strict=True)]

    def __enter__(self) -> Filling:
        _now.filling = self
        return self

    def __exit__(self, *_: object) -> None:
        _now.filling = None

    def add(self, out: torch.Tensor) -> None:
        """`out` was written."""
        place = out.data_ptr()
        if any(begin <= place < end for begin, end in self._places):
            self._left = [left - each for left, each in zip(self._left, _sums(out), strict=True)]

    @property
    def whole(self) -> bool:
        """Whether every byte was written."""
        return not any(self._left)


class Loan:
    """A gather's hold on memory: what it may write to while it is called, and never after."""

    def __init__(self, memory: memoryview) -> None:
        lent = (ctypes.c_ubyte * memory.nbytes).from_buffer(memory)  # can be watched
        self._memory = memoryview(lent).cast("B")
        self._lent = weakref.ref(lent)

    @property
    def memory(self) -> memoryview:
        """The same bytes."""
        return self._memory

    def is_back(self) -> bool:
        """Whether nobody refers to them any more. Ends the loan."""
        del self._memory
        return self._lent() is None


def written(out: torch.Tensor) -> None:
    """Note that all of `out` was written, for whoever fills what it is a part of."""
    filling = getattr(_now, "filling", None)
    if filling is not None:
        filling.add(out)


def clear(tensors: Tensors) -> None:
    """Fill with zeros, and with marks that every layer, every head and every token has one of."""
    for tensor in tensors.values():
        tensor.view(torch.uint8).zero_()
        if (words := _words(tensor)) is not None:
            words[_diagonal(words.shape[:-1])] = _MARK


def left(tensors: Tensors) -> bool:
    """Whether marks are left of `clear`."""
    return any(
        bool((words[_diagonal(words.shape[:-1])] == _MARK).any())
        for tensor in tensors.values()
        if (words := _words(tensor)) is not None
    )


def _words(tensor: torch.Tensor) -> torch.Tensor | None:
    """[layers, heads, tokens, words]; None for rows that are no whole words."""
    row = tensor.shape[-1] * tensor.element_size()
    aligned = row % 8 == 0 and tensor.storage_offset() * tensor.element_size() % 8 == 0
    return tensor.view(torch.int64) if aligned and tensor.numel() else None


@lru_cache(maxsize=64)
def _diagonal(shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Places of rows, so many that each index of each dimension is among them."""
    places = torch.arange(max(shape))
    return tuple(places % size for size in shape)


def _sums(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Of the addresses of a tensor's bytes: count, twice their sum, 12 times that of squares."""
    size = tensor.element_size()
    count, twice, spread = size, 2 * tensor.data_ptr() + size - 1, size * size - 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        step = stride * size
        count *= length
        twice += step * (length - 1)
        spread += step * step * (length * length - 1)
    return count, count * twice, count * (spread + 3 * twice * twice)
