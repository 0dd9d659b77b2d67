"""Cache layers that `generate` fills: a prefix with room behind it, and what a window forgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmcache_connectors.transformers.refusal import NotCacheable

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, [batch, kv_heads, columns, dim]."""


class WithRoom(DynamicLayer):
    """A full layer that holds a prefix with room behind it.

    Its first update writes there instead of copying both into fresh memory; from then on it is a
    plain DynamicLayer. (A class and not a closure, so that a deep copy updates itself.)
    """

    room: Pair
    awaited: int | None
    """Columns that the first update must bring."""
    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Pair:
        """As DynamicLayer's."""
        keys, values = self.__dict__.pop("room")
        _expect(self.__dict__.pop("awaited"), key_states)
        self.__class__ = DynamicLayer
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        here = self.keys.data_ptr() == keys.data_ptr() and self.keys.shape[0] == keys.shape[0]
        if not here or end > keys.shape[2]:
            return self.update(key_states, value_states, *args, **kwargs)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values


class Noting(DynamicSlidingWindowLayer):
    """A sliding layer that keeps, by reference, what it is given and will forget."""

    noted: list[Pair]
    noted_from: int
    """Column of the first note."""
    awaited: int | None
    """Columns that the first update must bring."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Pair:
        """As DynamicSlidingWindowLayer's."""
        _expect(self.awaited if not self.noted else None, key_states)
        self.noted.append((key_states, value_states))
        pair: Pair = super().update(key_states, value_states, *args, **kwargs)
        return pair


def filled(model: PreTrainedModel, prefix: Sequence[Pair], columns: int) -> DynamicCache:
    """The cache that generate would have made, holding the first `columns` columns of `prefix`."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for layer, (keys, values) in zip(cache.layers, prefix, strict=True) if columns else ():
        layer.lazy_initialization(keys, values)
        first = 0
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = columns
            first = max(0, columns - layer.sliding_window + 1)
        else:
            layer.__class__ = WithRoom
            layer.room, layer.awaited = (keys, values), None
        layer.keys = keys[:, :, first:columns]
        layer.values = values[:, :, first:columns]
    return cache


def _expect(awaited: int | None, states: torch.Tensor) -> None:
    if awaited not in (None, states.shape[2]):
        raise NotCacheable("inputs besides the prompt, put in within generate")


def note(cache: DynamicCache, columns: int, awaited: int | None = None) -> None:
    """Let the sliding layers of a cache with `columns` columns note what comes, and each layer
    refuse a first update of other than `awaited` columns."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.__class__ = Noting
            layer.noted, layer.noted_from, layer.awaited = [], columns, awaited
        elif isinstance(layer, WithRoom):
            layer.awaited = awaited


def stop_noting(cache: DynamicCache) -> None:
    """Give the sliding layers their own class back."""
    for layer in cache.layers:
        if isinstance(layer, Noting):
            del layer.noted, layer.noted_from, layer.awaited
            layer.__class__ = DynamicSlidingWindowLayer


def columns_of(layer: DynamicLayer, part: int, row: int, start: int, end: int) -> torch.Tensor:
    """KV of columns `start` to `end` of one row of a layer, [kv_heads, end - start, dim].

    part: 0 for keys, 1 for values. Raises NotCacheable where a layer has forgotten them.
    """
    if isinstance(layer, Noting) and start >= layer.noted_from:
        return _noted(layer, part, row, start - layer.noted_from, end - layer.noted_from)
    kept: torch.Tensor = (layer.keys, layer.values)[part]
    gone = layer.get_seq_length() - kept.shape[2]
    if start < gone:
        raise NotCacheable("a sliding window that has moved on (use load_prefix's cache)")
    return kept[row, :, start - gone : end - gone]


def _noted(layer: Noting, part: int, row: int, start: int, end: int) -> torch.Tensor:
    pieces = []
    for pair in layer.noted:
        length = pair[part].shape[2]
        if start < length and end > 0:
            pieces.append(pair[part][row, :, max(start, 0) : end])
        start, end = start - length, end - length
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
