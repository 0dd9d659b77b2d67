"""A model and its cache: `generate` with the stored prefix, and what it stores."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from lmcache_connectors._sharing import shared_namespace
from lmcache_connectors.transformers.call import Call, pads_of
from lmcache_connectors.transformers.identity import refuse_state, signature
from lmcache_connectors.transformers.layers import Pair, columns_of, filled, note, stop_noting
from lmcache_connectors.transformers.refusal import NotCacheable
from lmcache_connectors.transformers.shape import Shape
from lmcache_core import CacheEngine, Hit, Namespace, Tensors, copy_exact, tenant_digest

log = logging.getLogger("lmcache_core")


def attach(
    model: PreTrainedModel, cache: CacheEngine, *, tenant: str = "", share_as: str = ""
) -> Attached:
    """Make `model.generate` (and pipelines) reuse KV from `cache`, until `detach`.

    `tenant`: a salt; callers with different salts share nothing. `share_as`: a name that you give
    to the same model in other engines, too (vLLM's `share_as`), so that they share KV; it ends
    where the weights change or an adapter is active. Raises ValueError for both at once and where
    the model has a cache already, and ConfigError where a tier cannot hold one chunk of its KV.

    Weights may change meanwhile. Only what PyTorch counts is noticed, though: after a change in
    place through `.data` or in inference mode, attach again.
    """
    if isinstance(_owner(model), Attached):
        raise ValueError("the model is attached already; detach it first")
    if tenant and share_as:
        raise ValueError("a tenant's KV is not shared with other engines: no share_as")
    attached = Attached(model, cache, tenant, share_as)
    model.generate = attached._generate
    return attached


def detach(model: PreTrainedModel) -> None:
    """Give the model its own `generate` back; nothing happens where it has it."""
    if isinstance(_owner(model), Attached):
        del model.generate


def _owner(model: PreTrainedModel) -> object:
    return getattr(model.__dict__.get("generate"), "_lmcache", None)


class Attached:
    """A model and its cache. A context manager that detaches at its end."""

    def __init__(
        self, model: PreTrainedModel, cache: CacheEngine, tenant: str, share_as: str
    ) -> None:
        self._model, self._cache = model, cache
        self._share_as = share_as
        self._attached_to: Namespace | None = None
        self._tenant = tenant_digest(tenant) if tenant else ""
        self._own_generate = model.generate
        self._said: set[str] = set()
        self._known: WeakKeyDictionary[DynamicCache, list[int]] = WeakKeyDictionary()
        parameters = inspect.signature(type(model).forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._takes_positions = "position_ids" in parameters
        self._seen: object = None
        self._shape: Shape | NotCacheable = NotCacheable("a model not looked at yet")
        try:
            self._current()
        except NotCacheable as reason:
            self._say(str(reason))

        @functools.wraps(self._own_generate)
        def generate(*args: Any, **kwargs: Any) -> Any:
            return self._served(args, kwargs)

        generate._lmcache = self  # type: ignore[attr-defined]
        self._generate = generate

    def detach(self) -> None:
        """Give the model its own `generate` back."""
        if _owner(self._model) is self:
            detach(self._model)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # For those who drive the forward pass themselves

    def load_prefix(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[DynamicCache, int]:
        """A cache that holds the stored prefix of a prompt, and its length in tokens (columns).

        input_ids: [batch, tokens]. attention_mask: the same shape, zeros for padding on the left.
        At least one token is left to compute. Without a hit, or where this model's KV cannot be
        reused, the cache is empty.
        """
        try:
            prompt = self._prompt(input_ids, attention_mask)
            return prompt.cache, prompt.columns
        except NotCacheable as reason:
            self._say(str(reason))
            return DynamicCache(config=self._model.config.get_text_config(decoder=True)), 0

    def store(
        self,
        input_ids: torch.Tensor,
        cache: DynamicCache,
        attention_mask: torch.Tensor | None = None,
    ) -> int:
        """Store the KV that `cache` holds of `input_ids` ([batch, tokens]); returns new chunks.

        Layers with a sliding window can be stored only from a cache that `load_prefix` made.
        Positions must count from each row's first real token, as generate's do.
        """
        try:
            shape = self._current()
            pads = self._pads(input_ids, attention_mask)
            length = min(cache.get_seq_length(), input_ids.shape[1])
            known = self._known.get(cache, [0] * len(pads))
            rows = [
                _Row(input_ids[n, pad:length].cpu(), pad, known[n]) for n, pad in enumerate(pads)
            ]
            return sum(self._store_row(shape, cache, n, row) for n, row in enumerate(rows))
        except NotCacheable as reason:
            self._say(str(reason))
            return 0

    # generate

    def _served(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            call = Call(self._model, self._own_generate, args, kwargs)
            prompt = self._prompt(call.input_ids, call.attention_mask, call.repeats)
        except NotCacheable as reason:
            self._say(str(reason))
            return self._own_generate(*args, **kwargs)
        except Exception as error:  # a fault of ours must not be the caller's
            self._say(f"an unexpected {error!r}")
            return self._own_generate(*args, **kwargs)
        cache = {"attention_mask": prompt.mask, self._cache_argument: prompt.cache}
        output = self._own_generate(**{**call.arguments, **cache})
        try:
            self._store_output(prompt, output, call.eos)
        except Exception as error:
            self._say(f"an output that could not be stored ({error!r})")
        stop_noting(prompt.cache)
        return output

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            name = type(self._model).__name__
            log.warning("%s generates without cached KV where there is %s", name, reason)

    def _current(self) -> Shape:
        """What the model's KV is now. Weights that changed since the last call change it."""
        refuse_state(self._model)
        seen = signature(self._model)
        if seen != self._seen:
            try:
                self._shape = self._shared(
                    Shape.of(self._model, self._cache, self._cache_argument, self._tenant)
                )
            except NotCacheable as reason:
                self._shape = reason
            self._seen = seen
        if isinstance(self._shape, NotCacheable):
            raise NotCacheable(*self._shape.args)
        return self._shape

    def _shared(self, shape: Shape) -> Shape:
        """The same under the name that other engines know, while the model is what it was."""
        self._attached_to = self._attached_to or shape.namespace
        changed = shape.namespace != self._attached_to or shape.namespace.adapter
        if not self._share_as or changed:
            return shape
        config = self._model.config.get_text_config(decoder=True)
        layout = shape.namespace.layout
        namespace = shared_namespace(self._cache, self._share_as, config, layout)
        return shape._replace(namespace=namespace)

    def _prompt(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, repeats: int = 1
    ) -> _Prompt:
        """Load what is stored of each row, as far as all rows of the batch have it."""
        shape = self._current()
        pads = self._pads(input_ids, mask)
        size, width = self._cache.chunk_size, input_ids.shape[1]
        ids = input_ids.cpu()
        hits = [
            self._cache.lookup(self._cache.keys(shape.namespace, ids[n, pad : width - 1]))
            for n, pad in enumerate(pads)
        ]
        columns = min(pad + hit.chunks * size for pad, hit in zip(pads, hits, strict=True))
        prefix = shape.empty(len(pads) * repeats, width if columns else 0)
        known: list[int] = []
        for pad, hit in zip(pads, hits, strict=True):
            rows = slice(len(known), len(known) + repeats)
            wanted = max(0, -(-(columns - pad) // size))
            loaded = self._load_row(shape, prefix, rows, pad, hit.first(wanted))
            columns = min(columns, pad + loaded * size)
            known += [loaded] * repeats
        columns = columns if any(known) else 0
        cache = filled(self._model, prefix, columns)
        note(cache, columns)
        self._known[cache] = known
        all_pads = [pad for pad in pads for _ in range(repeats)]
        mask = torch.ones_like(input_ids) if mask is None else mask
        return _Prompt(shape, cache, columns, all_pads, known, mask)

    def _pads(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
        """Columns of padding on the left of each row."""
        pads = pads_of(input_ids, mask)
        if any(pads) and not self._takes_positions:  # then a row's KV may depend on its padding
            raise NotCacheable("padding in a model that takes no position_ids")
        return pads

    def _load_row(
        self, shape: Shape, prefix: Sequence[Pair], rows: slice, pad: int, hit: Hit
    ) -> int:
        """Copy a row's stored chunks to their columns of `prefix`; returns how many came."""
        loaded = 0
        size = self._cache.chunk_size
        for chunk in self._cache.load(hit):
            start = pad + chunk.index * size
            for layer, part, tensor in shape.parts(chunk.tensors):
                target = prefix[layer][part][rows, :, start : start + size]
                whole = tensor.expand(target.shape[0], *tensor.shape)
                copy_exact(target, whole[:, :, : target.shape[2]])
            loaded += 1
        if pad:
            for pair in prefix:
                for tensor in pair:
                    tensor[rows, :, :pad] = 0  # nobody attends to padding; NaN would still spread
        return loaded

    def _store_output(self, prompt: _Prompt, output: Any, eos: frozenset[int]) -> None:
        sequences = (output if isinstance(output, torch.Tensor) else output.sequences).cpu()
        # The last token's KV has not been computed.
        if prompt.cache.get_seq_length() < sequences.shape[1] - 1:
            raise RuntimeError("generate did not fill the cache that it was given")
        width = prompt.mask.shape[1]
        for n, pad in enumerate(prompt.pads):
            end = sequences.shape[1] - 1
            for column in range(width, end):  # what follows a row's end is padding
                if int(sequences[n, column]) in eos:
                    end = column + 1
                    break
            row = _Row(sequences[n, pad:end], pad, prompt.known[n])
            self._store_row(prompt.shape, prompt.cache, n, row)

    def _store_row(self, shape: Shape, cache: DynamicCache, number: int, row: _Row) -> int:
        keys = self._cache.keys(shape.namespace, row.tokens)
        size = self._cache.chunk_size

        def gather(index: int, out: Tensors) -> None:
            start = row.pad + index * size
            for layer, part, tensor in shape.parts(out):
                source = columns_of(cache.layers[layer], part, number, start, start + size)
                copy_exact(tensor, source)

        return self._cache.store(shape.namespace, keys, gather, start=row.known)


class _Prompt(NamedTuple):
    """A batch ready for generate: its cache holds the first `columns` columns of every row."""

    shape: Shape
    cache: DynamicCache
    columns: int
    pads: list[int]
    known: list[int]
    """Chunks of each row that are stored already."""
    mask: torch.Tensor


class _Row(NamedTuple):
    """One sequence whose KV is in a cache from column `pad` on, `known` chunks of it stored."""

    tokens: torch.Tensor
    pad: int
    known: int
