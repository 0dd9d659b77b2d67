"""The trial: whether a model's KV stands for its prefix, found out by computing.

Two rows that differ in their last tokens are computed whole: before these, nothing may differ.
From a cache that holds their beginning, as a hit does, their end must come out the same. Then both
again with padding on the left of a row, which must move nothing either: without padding
Transformers leaves the mask to the kernel, so these are two ways. What a window or a chunk of
attention does shows only beyond it, so the rows are longer than those that the config names, up to
MOST_COLUMNS.

In all two prefills, and two of REST columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from lmcache_connectors.transformers.layers import Pair, columns_of, filled, note
from lmcache_connectors.transformers.refusal import NotCacheable

COLUMNS = 64
MOST_COLUMNS = 512
PADS = 3
REST = 12
"""Columns that are computed from a cache of those before them."""
ROUNDING = 24
"""Units in the last place by which another way to the same may differ, in deviations of the KV."""
REORDERING = 8
"""The same for tokens that come after: experts may compute them in another order."""


class _Computed(NamedTuple):
    kv: list[Pair]
    """Of each layer, [rows, kv_heads, columns, dim]."""
    last: torch.Tensor
    """Logits of the last column, [rows, vocabulary]."""

    def row(self, number: int, columns: slice) -> list[Pair]:
        """Of one row, [columns, kv_heads, dim]."""
        return [
            (keys[number, :, columns].transpose(0, 1), values[number, :, columns].transpose(0, 1))
            for keys, values in self.kv
        ]


class Trial:
    """One model's. `argument`: its name for the cache; `positions`: whether it is told them."""

    def __init__(self, model: PreTrainedModel, argument: str, positions: bool) -> None:
        self._model, self._argument, self._positions = model, argument, positions
        config = model.config.get_text_config(decoder=True)
        self._columns = min(MOST_COLUMNS, max([COLUMNS, *(n + 2 * REST for n in _windows(config))]))
        self._kept = self._columns - REST
        vocabulary = model.get_input_embeddings().weight.shape[0]
        tokens = 7919 * torch.arange(1, self._columns + 1)
        others = torch.cat([tokens[: self._kept], tokens[self._kept :] * 31 + 11])
        self._ids = torch.stack([tokens, others]).remainder(vocabulary).to(model.device)

    def run(self) -> None:
        """Raise NotCacheable where KV does not stand for its prefix."""
        mask = torch.ones_like(self._ids)
        plain = self._compute(self._ids, mask)
        if self._later_tokens_move(plain, mask):
            raise NotCacheable("attention to later tokens: KV that does not stand for its prefix")
        self._go_on(plain, self._ids, mask)
        if self._positions:
            mask[0, :PADS] = 0
            ids = torch.stack([self._ids[0].roll(PADS), self._ids[1]])
            padded = self._compute(ids, mask)
            behind, before, every = slice(PADS, None), slice(-PADS), slice(None)
            moved = _moved(padded.row(0, behind), plain.row(0, before))
            moved = max(moved, _moved(padded.row(1, every), plain.row(1, every)))
            if moved > _tolerance(plain, ROUNDING):
                raise NotCacheable("padding that moves what is behind it")
            self._go_on(padded, ids, mask)

    def _go_on(self, whole: _Computed, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """The end, computed from a cache of the beginning, must be the same."""
        prefix = [(keys.clone(), values.clone()) for keys, values in whole.kv]
        rest = self._compute(ids, mask, filled(self._model, prefix, self._kept), self._kept)
        end = slice(self._kept, None)
        moved = max(_moved(whole.row(n, end), rest.row(n, end)) for n in (0, 1))
        if max(moved, _distance(whole.last, rest.last)) > _tolerance(whole, ROUNDING):
            raise NotCacheable("a model that computes otherwise from a cache")

    def _later_tokens_move(self, plain: _Computed, mask: torch.Tensor) -> bool:
        """Two rows of a batch tell it, or, if they are rounded each in its way, one of two."""
        before, tolerance = slice(self._kept), _tolerance(plain, REORDERING)
        if _moved(plain.row(0, before), plain.row(1, before)) <= tolerance:
            return False
        turned = self._compute(self._ids.flip(0), mask)
        return _moved(plain.row(0, before), turned.row(0, before)) > tolerance

    def _compute(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache | None = None,
        start: int = 0,
    ) -> _Computed:
        """A forward pass of the columns from `start` on, which `cache` holds those before of."""
        if cache is None:
            cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        note(cache, start)
        more: dict[str, Any] = {self._argument: cache, "use_cache": True}
        if self._positions:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        with torch.no_grad():
            output = self._model(input_ids=ids[:, start:], attention_mask=mask, **more)
        kv = [tuple(self._kv(layer, part, start) for part in (0, 1)) for layer in cache.layers]
        return _Computed(kv, output.logits[:, -1])  # type: ignore[arg-type]

    def _kv(self, layer: Any, part: int, start: int) -> torch.Tensor:
        rows = [columns_of(layer, part, row, start, self._columns) for row in (0, 1)]
        gap = torch.zeros_like(rows[0][:, :1]).expand(-1, start, -1)
        return torch.stack([torch.cat([gap, row], dim=1) for row in rows])


def _tolerance(computed: _Computed, units: int) -> float:
    return max(1e-4, units * torch.finfo(computed.last.dtype).eps)


def _moved(one: list[Pair], other: list[Pair]) -> float:
    """The largest distance of a column's KV, of all layers."""
    return max(
        _distance(x, y)
        for pair, twin in zip(one, other, strict=True)
        for x, y in zip(pair, twin, strict=True)
    )


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of rows: the largest root mean square of a row's difference, in deviations of all."""
    one, other = one.float().flatten(1), other.float().flatten(1)
    difference = (one - other).square().mean(1).sqrt().max()
    distance = float(difference / one.std().clamp(min=1e-12))
    return math.inf if math.isnan(distance) else distance


def _windows(config: Any) -> Iterator[int]:
    """Lengths that the config calls a window or a chunk of attention."""
    for name, value in vars(config).items():
        if ("window" in name or "chunk" in name) and type(value) is int and value > 0:
            yield value
