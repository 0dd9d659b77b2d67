"""Hugging Face Transformers: `attach(model, cache)`, then `model.generate` reuses KV.

A call that can be served looks up its prompt, puts the stored prefix into the DynamicCache that
`generate` would have made itself, lets it compute the rest and stores what is new, generated
tokens included. A call that cannot (beams, embeddings, a cache of the caller's ...) runs exactly
as without us, and one log line says why.

KV is taken at the cache layers, so shapes come from tensors and not from the config. Full layers
keep every token. Sliding layers forget what leaves their window, so what they are given is noted
during the call (`_Noting`), by reference.

Transformers 5.16 to 5.24. The cache argument's name changed within; the signature tells.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import xxhash
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmcache_connectors._sharing import config_digest, shared_namespace
from lmcache_core import (
    CacheEngine,
    Hit,
    KVLayout,
    LayerGroup,
    Namespace,
    Tensors,
    copy_exact,
    scratch,
    tenant_digest,
)

log = logging.getLogger("lmcache_core")

_ODD = {"xlm", "flaubert", "moshi"}
"""Models that put tokens of their own behind the prompt, or whose split prefill is another one."""
_ONE_SEQUENCE = {
    "assistant_model": "assisted generation",
    "prompt_lookup_num_tokens": "prompt lookup",
    "assistant_early_exit": "assisted generation",
    "negative_prompt_ids": "a negative prompt",
    "custom_generate": "a custom generate",
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa",
    "constraints": "constraints",
    "force_words_ids": "constraints",
    "token_healing": "token healing",
    "prefill_chunk_size": "a prefill in chunks",
}
"""Arguments of generate, and what they ask for, that are not one forward pass after the other."""


_Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, [batch, kv_heads, columns, dim]."""


class _NotCacheable(Exception):
    """Why a call runs without us."""


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
        self._shape: _Shape | _NotCacheable = _NotCacheable("a model not looked at yet")
        try:
            self._current()
        except _NotCacheable as reason:
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
        except _NotCacheable as reason:
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
        except _NotCacheable as reason:
            self._say(str(reason))
            return 0

    # generate

    def _served(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            call = _Call(self._model, self._own_generate, args, kwargs)
            prompt = self._prompt(call.input_ids, call.attention_mask, call.repeats)
        except _NotCacheable as reason:
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
        _stop_noting(prompt.cache)
        return output

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            name = type(self._model).__name__
            log.warning("%s generates without cached KV where there is %s", name, reason)

    def _current(self) -> _Shape:
        """What the model's KV is now. Weights that changed since the last call change it."""
        _refuse_state(self._model)
        seen = _signature(self._model)
        if seen != self._seen:
            try:
                self._shape = self._shared(
                    _Shape.of(self._model, self._cache, self._cache_argument, self._tenant)
                )
            except _NotCacheable as reason:
                self._shape = reason
            self._seen = seen
        if isinstance(self._shape, _NotCacheable):
            raise _NotCacheable(*self._shape.args)
        return self._shape

    def _shared(self, shape: _Shape) -> _Shape:
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
        cache = _filled(self._model, prefix, columns)
        _note(cache, columns)
        self._known[cache] = known
        all_pads = [pad for pad in pads for _ in range(repeats)]
        mask = torch.ones_like(input_ids) if mask is None else mask
        return _Prompt(shape, cache, columns, all_pads, known, mask)

    def _pads(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
        """Columns of padding on the left of each row."""
        pads = _pads(input_ids, mask)
        if any(pads) and not self._takes_positions:  # then a row's KV may depend on its padding
            raise _NotCacheable("padding in a model that takes no position_ids")
        return pads

    def _load_row(
        self, shape: _Shape, prefix: Sequence[_Pair], rows: slice, pad: int, hit: Hit
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

    def _store_row(self, shape: _Shape, cache: DynamicCache, number: int, row: _Row) -> int:
        keys = self._cache.keys(shape.namespace, row.tokens)
        size = self._cache.chunk_size

        def gather(index: int, out: Tensors) -> None:
            start = row.pad + index * size
            for layer, part, tensor in shape.parts(out):
                source = _columns(cache.layers[layer], part, number, start, start + size)
                copy_exact(tensor, source)

        return self._cache.store(shape.namespace, keys, gather, start=row.known)


class _Prompt(NamedTuple):
    """A batch ready for generate: its cache holds the first `columns` columns of every row."""

    shape: _Shape
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


class _Call:
    """The arguments of one call of generate, as far as they decide whether it can be served."""

    def __init__(
        self, model: PreTrainedModel, generate: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        bound = inspect.signature(generate).bind(*args, **kwargs)
        extra = bound.arguments.pop("kwargs", {})
        self.arguments: dict[str, Any] = {**bound.arguments, **extra}
        self._configs = [self.arguments.get("generation_config"), model.generation_config]
        self._refuse_arguments(inspect.signature(generate).parameters)
        self._refuse_options()
        if self._option("cache_implementation") == "dynamic":  # beside a cache it is an error
            self.arguments["cache_implementation"] = None
        ids = self.arguments.get("inputs")
        self.input_ids: Any = self.arguments.get("input_ids") if ids is None else ids
        self._check_ids()
        self.attention_mask = self.arguments.get("attention_mask")
        self.repeats = int(self._option("num_return_sequences") or 1)
        eos = self._option("eos_token_id")
        self.eos = frozenset(torch.as_tensor([] if eos is None else eos).view(-1).long().tolist())
        if self.attention_mask is None:
            self._refuse_pads()

    def _option(self, name: str) -> Any:
        """An option of generation, from wherever generate would take it."""
        values = [self.arguments.get(name), *(getattr(c, name, None) for c in self._configs if c)]
        return next((value for value in values if value is not None), None)

    def _refuse_arguments(self, known: Mapping[str, Any]) -> None:
        understood = {*known, *_generation_options(), "input_ids", "attention_mask", "tokenizer"}
        for name in ("cache", "past_key_values"):
            if self.arguments.get(name) is not None:
                raise _NotCacheable("a cache of the caller's own")
        for name, value in self.arguments.items():
            if value is not None and name not in understood:
                raise _NotCacheable(f"the argument {name}")

    def _refuse_options(self) -> None:
        for name, what in _ONE_SEQUENCE.items():
            if self._option(name) not in (None, False):
                raise _NotCacheable(what)
        if (self._option("num_beams") or 1) > 1:
            raise _NotCacheable("beam search")
        # Old checkpoints with sliding windows say "hybrid"; generate takes that for None.
        if self._option("cache_implementation") not in (None, "dynamic", "hybrid"):
            raise _NotCacheable(f"a {self._option('cache_implementation')} cache")
        if self._option("output_hidden_states") or self._option("output_attentions"):
            raise _NotCacheable("output_hidden_states or output_attentions, of the whole prompt")
        if self._option("use_cache") is False:
            raise _NotCacheable("use_cache=False")

    def _check_ids(self) -> None:
        ids = self.input_ids
        whole = isinstance(ids, torch.Tensor) and ids.dtype in (torch.int64, torch.int32)
        if not (whole and ids.dim() == 2 and ids.numel()):
            raise _NotCacheable("a prompt that is not token ids [batch, tokens]")

    def _refuse_pads(self) -> None:
        """Without a mask generate guesses one from pad tokens; we do not."""
        pad = self._option("pad_token_id")
        if pad is not None and int(pad) not in self.eos and bool((self.input_ids == pad).any()):
            raise _NotCacheable("a pad token in the prompt and no attention_mask")


@functools.cache
def _generation_options() -> frozenset[str]:
    return frozenset(GenerationConfig().to_dict())


def _pads(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    """Columns of padding on the left of each row."""
    if mask is None:
        return [0] * input_ids.shape[0]
    if mask.shape != input_ids.shape:
        raise _NotCacheable(f"an attention_mask of shape {list(mask.shape)}")
    there = mask.cpu() != 0
    pads = (~there).sum(dim=1)
    left = torch.arange(mask.shape[1])[None] >= pads[:, None]
    if not torch.equal(there, left) or int(mask.max()) > 1 or int(pads.max()) == mask.shape[1]:
        raise _NotCacheable("padding that is not on the left")
    return [int(pad) for pad in pads]


class _WithRoom(DynamicLayer):
    """A full layer that holds a prefix with room behind it.

    Its first update writes there instead of copying both into fresh memory; from then on it is a
    plain DynamicLayer. (A class and not a closure, so that a deep copy updates itself.)
    """

    room: _Pair
    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> _Pair:
        """As DynamicLayer's."""
        keys, values = self.__dict__.pop("room")
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


class _Noting(DynamicSlidingWindowLayer):
    """A sliding layer that keeps, by reference, what it is given and will forget."""

    noted: list[_Pair]
    noted_from: int
    """Column of the first note."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> _Pair:
        """As DynamicSlidingWindowLayer's."""
        self.noted.append((key_states, value_states))
        pair: _Pair = super().update(key_states, value_states, *args, **kwargs)
        return pair


def _note(cache: DynamicCache, columns: int) -> None:
    """Let the sliding layers of a cache with `columns` columns note what comes."""
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.__class__ = _Noting
            layer.noted, layer.noted_from = [], columns


def _stop_noting(cache: DynamicCache) -> None:
    for layer in cache.layers:
        if isinstance(layer, _Noting):
            del layer.noted, layer.noted_from
            layer.__class__ = DynamicSlidingWindowLayer


def _columns(layer: DynamicLayer, part: int, row: int, start: int, end: int) -> torch.Tensor:
    """KV of columns `start` to `end` of one row of a layer, [kv_heads, end - start, dim].

    part: 0 for keys, 1 for values. Raises _NotCacheable where a layer has forgotten them.
    """
    if isinstance(layer, _Noting) and start >= layer.noted_from:
        return _noted(layer, part, row, start - layer.noted_from, end - layer.noted_from)
    kept: torch.Tensor = (layer.keys, layer.values)[part]
    gone = layer.get_seq_length() - kept.shape[2]
    if start < gone:
        raise _NotCacheable("a sliding window that has moved on (use load_prefix's cache)")
    return kept[row, :, start - gone : end - gone]


def _noted(layer: _Noting, part: int, row: int, start: int, end: int) -> torch.Tensor:
    pieces = []
    for pair in layer.noted:
        length = pair[part].shape[2]
        if start < length and end > 0:
            pieces.append(pair[part][row, :, max(start, 0) : end])
        start, end = start - length, end - length
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]


class _Shape(NamedTuple):
    """What the model's KV is: learned from the cache that one token leaves behind."""

    namespace: Namespace
    devices: list[torch.device]

    @classmethod
    def of(cls, model: PreTrainedModel, cache: CacheEngine, argument: str, tenant: str) -> _Shape:
        """Raises _NotCacheable, and ConfigError where a tier cannot hold one chunk."""
        config = model.config.get_text_config(decoder=True)
        if model.config.is_encoder_decoder:
            raise _NotCacheable("an encoder-decoder model")
        if _rope_types(config) & {"dynamic", "longrope"}:
            raise _NotCacheable("a position encoding that depends on the prompt's length")
        if config.model_type in _ODD:
            raise _NotCacheable("a model whose generate is not a plain continuation")
        if any(hasattr(module, "rope_deltas") for module in model.modules()):
            raise _NotCacheable("a model whose positions depend on earlier calls")
        layers = _probe(model, argument)
        layout = KVLayout(groups=_groups(layers, config))
        namespace = cache.namespace(
            model=getattr(model.config, "_name_or_path", "") or type(model).__name__,
            layout=layout,
            weights=_fingerprint(model),
            positions=json.dumps(_positions(config), sort_keys=True, default=str),
            adapter=_adapters(model),
            tenant=tenant,
            extra={
                "class": type(model).__name__,
                "attention": _attention(config),
                "config": config_digest(config),
            },
        )
        return cls(namespace, [layer.keys.device for layer in layers])

    def parts(self, tensors: Tensors) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(layer, 0 for keys or 1 for values, [kv_heads, tokens, dim]) of a chunk's tensors."""
        for g, group in enumerate(self.namespace.layout.groups):
            for part, name in enumerate((f"g{g}.k", f"g{g}.v")):
                if name in tensors:
                    for layer, tensor in zip(group.layers, tensors[name], strict=True):
                        yield layer, part, tensor

    def empty(self, rows: int, columns: int) -> list[_Pair]:
        """Uninitialised keys and values of each layer, those of a device in one allocation."""
        parts: list[list[torch.Tensor]] = [[] for _ in self.devices]
        for group in self.namespace.layout.groups:
            dtype = getattr(torch, group.dtype)
            for device in dict.fromkeys(self.devices[layer] for layer in group.layers):
                layers = [layer for layer in group.layers if self.devices[layer] == device]
                for dim in (group.key_dim, group.value_dim):
                    shape = (len(layers), rows, group.kv_heads, columns, dim)
                    for layer, tensor in zip(layers, scratch(shape, dtype, device), strict=True):
                        parts[layer].append(tensor)
        return [(keys, values) for keys, values in parts]


def _filled(model: PreTrainedModel, prefix: Sequence[_Pair], columns: int) -> DynamicCache:
    """The cache that generate would have made, holding the first `columns` columns of `prefix`."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for layer, (keys, values) in zip(cache.layers, prefix, strict=True) if columns else ():
        layer.lazy_initialization(keys, values)
        first = 0
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = columns
            first = max(0, columns - layer.sliding_window + 1)
        else:
            layer.__class__ = _WithRoom
            layer.room = (keys, values)
        layer.keys = keys[:, :, first:columns]
        layer.values = values[:, :, first:columns]
    return cache


def _probe(model: PreTrainedModel, argument: str) -> list[DynamicLayer]:
    """The cache's layers after one token."""
    try:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        with torch.no_grad():
            model(input_ids=token, use_cache=True, **{argument: cache})
    except Exception as error:
        raise _NotCacheable(f"a model that takes no DynamicCache ({error!r})") from error
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise _NotCacheable(f"a layer that is not indexed by token ({type(layer).__name__})")
        if not layer.is_initialized or layer.keys.dim() != 4 or layer.keys.shape[2] != 1:
            raise _NotCacheable("a layer that keeps no KV of its own")
    if not cache.layers:
        raise _NotCacheable("a model without KV")
    return list(cache.layers)


def _groups(layers: Sequence[DynamicLayer], config: Any) -> tuple[LayerGroup, ...]:
    """Layers that keep the same thing, together."""
    full = "mla" if getattr(config, "kv_lora_rank", None) else "attention"
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, layer in enumerate(layers):
        window = getattr(layer, "sliding_window", None)
        keys, values = layer.keys, layer.values
        if keys.dtype != values.dtype or keys.shape[:3] != values.shape[:3]:
            raise _NotCacheable("keys and values that differ in more than their last dimension")
        what = (window, keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        alike.setdefault(what, []).append(number)
    return tuple(
        LayerGroup(
            kind="sliding" if window else full,  # type: ignore[arg-type]
            layers=tuple(numbers),
            kv_heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            dtype=str(dtype).removeprefix("torch."),
            window=window,
        )
        for (window, heads, key_dim, value_dim, dtype), numbers in alike.items()
    )


def _attention(config: Any) -> str:
    return str(getattr(config, "_attn_implementation", ""))


def _positions(config: Any) -> dict[str, Any]:
    """What the config says of positions."""
    fields = config.to_dict()
    return {k: v for k, v in fields.items() if "rope" in k or "position" in k or "rotary" in k}


def _rope_types(config: Any) -> set[str]:
    """Every rope_type in the config, whichever way it nests them."""
    found: set[str] = set()
    todo: list[Any] = [_positions(config)]
    while todo:
        item = todo.pop()
        if isinstance(item, Mapping):
            found.update(str(v) for k, v in item.items() if k in ("rope_type", "type"))
            todo += item.values()
    return found


def _tensors(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def _refuse_state(model: PreTrainedModel) -> None:
    """Raise _NotCacheable where the model computes just now what its weights do not say."""
    if torch.is_autocast_enabled(model.device.type):
        raise _NotCacheable("autocast")
    for module in model.modules():
        if _drops(module):
            raise _NotCacheable("a model in training mode")
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            function = getattr(hook, "func", hook)
            # Transformers' own only collect outputs, and stay once somebody has asked for them.
            if not str(getattr(function, "__module__", "")).startswith("transformers."):
                raise _NotCacheable("a forward hook, which may change what the model computes")


def _drops(module: torch.nn.Module) -> bool:
    """Whether a module may drop something, as in training. Plain layers without dropout do not;
    peft's are in training mode when they are new."""
    if isinstance(module, torch.nn.Dropout):
        return module.training and module.p > 0
    return module.training and not type(module).__module__.startswith(("torch.nn.", "peft."))


def _signature(model: PreTrainedModel) -> object:
    """Changes with the weights, without reading them, and with the config."""
    config = model.config.get_text_config(decoder=True)
    return (
        [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in _tensors(model)],
        _adapters(model),
        _attention(config),
        config_digest(config),
    )


def _fingerprint(model: PreTrainedModel) -> str:
    """XXH3-128 over all weights and buffers: names, dtypes, shapes and bytes."""
    state = xxhash.xxh3_128()
    named = (*model.named_parameters(), *model.named_buffers())
    try:
        for name, tensor in named:
            state.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            flat = tensor.detach().cpu().contiguous().view(-1)
            state.update(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise _NotCacheable(f"weights that cannot be read ({error})") from error
    return state.hexdigest()


def _adapters(model: PreTrainedModel) -> str:
    """Which adapters are active or merged, and how strongly: no weight of peft tells."""
    if not getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
        return ""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    states = [
        [getattr(m, name, None) for name in names]
        for m in model.modules()
        if hasattr(m, "scaling") and hasattr(m, "active_adapters")
    ]
    return hashlib.blake2b(repr(states).encode(), digest_size=16).hexdigest()
