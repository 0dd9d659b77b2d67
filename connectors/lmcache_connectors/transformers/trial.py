"""The trial: whether a model's KV stands for its prefix, found out by computing.

A short batch, with padding on the left of one row, is computed three times: whole; with other
tokens at its end, which must move nothing before them; and from a cache that holds the beginning,
as a hit does, which must compute the same end. Then the same without padding: Transformers leaves
the mask to the kernel where nothing is padded. What a window or a chunk of attention does shows
only beyond it, so the batch is longer than those that the config names, up to MOST_COLUMNS.
"""

from __future__ import annotations

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
"""Units in the last place by which a split prefill may differ, in shares of the KV's deviation."""
REORDERING = 8
"""The same for tokens that come after: experts may compute them in another order."""


class _Computed(NamedTuple):
    kv: list[Pair]
    """Of each layer, [rows, kv_heads, columns, dim]."""
    last: torch.Tensor
    """Logits of the last column."""


class Trial:
    """One model's. `argument`: its name for the cache; `positions`: whether it is told them."""

    def __init__(self, model: PreTrainedModel, argument: str, positions: bool) -> None:
        self._model, self._argument, self._positions = model, argument, positions
        config = model.config.get_text_config(decoder=True)
        self._columns = min(MOST_COLUMNS, max([COLUMNS, *(n + 2 * REST for n in _windows(config))]))
        self._kept = self._columns - REST
        vocabulary = model.get_input_embeddings().weight.shape[0]
        steps = 7919 * torch.arange(1, self._columns + 1)
        ids = torch.stack([steps % vocabulary, (steps * 31 + 11) % vocabulary])
        self._ids = ids.to(model.device)
        self._mask = torch.ones_like(self._ids)

    def run(self) -> None:
        """Raise NotCacheable where KV does not stand for its prefix."""
        self._run()
        if self._positions:
            self._mask[0, :PADS] = 0
            self._run()

    def _run(self) -> None:
        whole = self._compute(self._ids, _empty(self._model), 0)
        other = self._ids.clone()
        other[:, self._kept :] = self._ids[:, self._kept :].flip(0).roll(1, 1)
        moved = self._compute(other, _empty(self._model), 0)
        prefix = [(keys.clone(), values.clone()) for keys, values in whole.kv]
        cache = filled(self._model, prefix, self._kept)
        rest = self._compute(self._ids, cache, self._kept)

        eps = torch.finfo(whole.last.dtype).eps
        before, after = slice(0, self._kept), slice(self._kept, None)
        if not self._moved(whole.kv, moved.kv, before) <= max(1e-4, REORDERING * eps):
            raise NotCacheable("attention to later tokens: KV that does not stand for its prefix")
        split = max(self._moved(whole.kv, rest.kv, after), _distance(whole.last, rest.last))
        if not split <= max(1e-4, ROUNDING * eps):  # not a number, too
            raise NotCacheable("a model that computes otherwise from a cache")

    def _compute(self, ids: torch.Tensor, cache: DynamicCache, start: int) -> _Computed:
        """A forward pass of the columns from `start` on."""
        note(cache, start)
        more: dict[str, Any] = {self._argument: cache, "use_cache": True}
        if self._positions:
            more["position_ids"] = (self._mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        with torch.no_grad():
            output = self._model(input_ids=ids[:, start:], attention_mask=self._mask, **more)
        kv = [tuple(self._kv(layer, part, start) for part in (0, 1)) for layer in cache.layers]
        return _Computed(kv, output.logits[:, -1])  # type: ignore[arg-type]

    def _kv(self, layer: Any, part: int, start: int) -> torch.Tensor:
        rows = [columns_of(layer, part, row, start, self._columns) for row in (0, 1)]
        gap = torch.zeros_like(rows[0][:, :1]).expand(-1, start, -1)
        return torch.stack([torch.cat([gap, row], dim=1) for row in rows])

    def _moved(self, one: list[Pair], other: list[Pair], columns: slice) -> float:
        """The largest distance of a column's KV that is no padding."""
        real = self._mask.bool()[:, columns]
        return max(
            _distance(
                x[:, :, columns].transpose(1, 2)[real], y[:, :, columns].transpose(1, 2)[real]
            )
            for pair, twin in zip(one, other, strict=True)
            for x, y in zip(pair, twin, strict=True)
        )


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of rows: the largest root mean square of a row's difference, in deviations of all."""
    one, other = one.float().flatten(1), other.float().flatten(1)
    difference = (one - other).square().mean(1).sqrt().max()
    return float(difference / one.std().clamp(min=1e-12))


def _empty(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _windows(config: Any) -> Iterator[int]:
    """Lengths that the config calls a window or a chunk of attention."""
    for name, value in vars(config).items():
        if ("window" in name or "chunk" in name) and type(value) is int and value > 0:
            yield value
