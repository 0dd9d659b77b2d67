"""A model and its cache: `generate` with the stored prefix, and what it stores."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from lmcache_connectors._sharing import shared_namespace
from lmcache_connectors.transformers.call import Call, pads_of
from lmcache_connectors.transformers.identity import Identity, Observer, has_adapter
from lmcache_connectors.transformers.layers import Pair, columns_of, filled, note, stop_noting
from lmcache_connectors.transformers.refusal import NotCacheable, described
from lmcache_connectors.transformers.shape import Layers, Shape
from lmcache_connectors.transformers.trial import Trial
from lmcache_core import CacheEngine, ConfigError, Hit, Tensors, Weights, copy_exact
from lmcache_core.connector import tenant_digest, whole

log = logging.getLogger("lmcache_core")

K = TypeVar("K")
V = TypeVar("V")
IDENTITIES = 64
"""Identities whose KV is remembered: adapters that are switched to and fro."""
_AGAIN = object()
"""In place of an output: generate has to run anew, without us."""


def attach(
    model: PreTrainedModel, cache: CacheEngine, *, tenant: str = "", share_as: str = ""
) -> Attached:
    """Make `model.generate` (and pipelines) reuse KV from `cache`, until `detach`.

    `tenant`: a salt; callers with different salts share nothing. `share_as`: a name that you give
    to the same model in other engines, too (vLLM's `share_as`), so that they share KV; it ends
    where what the model computes changes or PEFT was at it. Raises ValueError for both at once and
    where the model has a cache already, and ConfigError where a tier cannot hold one chunk of its
    KV. Whatever else is the matter, the model generates as without us, and a log line says why.

    Weights, adapters, attributes and code may change meanwhile: what the model computes is
    observed at every call (docs/identity.md). Copies of the model are not attached.
    """
    model = _base_of(model)
    if _attached(model):
        raise ValueError("the model is attached already; detach it first")
    if tenant and share_as:
        raise ValueError("a tenant's KV is not shared with other engines: no share_as")
    attached = Attached(model, cache, tenant, share_as)
    attached.take_over()
    attached.look()
    return attached


def detach(model: PreTrainedModel) -> None:
    """Give the model its own `generate` back; nothing happens where it has it."""
    attached = _attached(_base_of(model))
    if attached:
        attached.detach()


def _base_of(model: Any) -> PreTrainedModel:
    """The model that computes: PEFT's around it call its generate."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def _attached(model: PreTrainedModel) -> Attached | None:
    """What the model is attached by."""
    return getattr(model.__dict__.get("generate"), "_lmcache", None)


class Attached:
    """A model and its cache. A context manager that detaches at its end."""

    def __init__(
        self, model: PreTrainedModel, cache: CacheEngine, tenant: str, share_as: str
    ) -> None:
        self.model, self._cache = model, cache
        self._share_as = share_as
        self._attached_to: Identity | None = None
        self._tenant = tenant_digest(tenant) if tenant else ""
        self._own = model.__dict__.get("generate")
        self._said: set[str] = set()
        self._known: WeakKeyDictionary[DynamicCache, _Known] = WeakKeyDictionary()
        parameters = inspect.signature(type(model).forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._takes_positions = "position_ids" in parameters
        self._observer = Observer(model)
        self._layers: dict[bytes, Layers | NotCacheable] = {}
        self._shapes: dict[Identity, Shape] = {}

    def __repr__(self) -> str:
        name, known = type(self.model).__name__, len(self._shapes)
        return f"Attached({name}, {known} identities, {self._observer})"

    def take_over(self) -> None:
        """Put what serves in the place of the model's generate, but not into copies of it."""

        @functools.wraps(type(self.model).generate)
        def generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            return self.generate(args, kwargs)

        generate._lmcache = self  # type: ignore[attr-defined]
        self.model.generate = types.MethodType(generate, self.model)
        self.model.__dict__["__getstate__"] = self._state

    def _state(self) -> Any:
        """What copy, pickle and torch.save make a copy of: the model as it is without us."""
        own = getattr(type(self.model), "__getstate__", None)
        state = own(self.model) if own else self.model.__dict__
        if not isinstance(state, dict):
            return state
        state = {key: state[key] for key in state if key not in ("generate", "__getstate__")}
        return state if self._own is None else {**state, "generate": self._own}

    def look(self) -> None:
        """Try the model, and say why its KV cannot be reused. Raises ConfigError."""
        try:
            self._current()
        except ConfigError:
            self.detach()
            raise
        except Exception as error:
            self._say_why(error)

    def detach(self) -> None:
        """Give the model its own `generate` back."""
        if _attached(self.model) is self:
            del self.model.generate, self.model.__dict__["__getstate__"]
            if self._own is not None:
                self.model.generate = self._own

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
        except Exception as error:
            self._say_why(error)
            return DynamicCache(config=self.model.config.get_text_config(decoder=True)), 0

    def store(
        self,
        input_ids: torch.Tensor,
        cache: DynamicCache,
        attention_mask: torch.Tensor | None = None,
    ) -> int:
        """Store the KV that `cache` holds of `input_ids` ([batch, tokens]); returns new chunks.

        Layers with a sliding window can be stored only from a cache that `load_prefix` made. Of
        such a cache nothing is stored where the model has changed since; that a cache of your own
        holds what the model computes now is for you to know.
        Positions must count from each row's first real token, as generate's do.
        """
        try:
            shape = self._current()
            pads = self._pads(input_ids, attention_mask)
            length = min(cache.get_seq_length(), input_ids.shape[1])
            known = self._known.get(cache, _Known(shape.identity, [0] * len(pads)))
            if known.identity != shape.identity:
                raise NotCacheable("a model that changed while it computed")
            rows = [
                _Row(input_ids[n, pad:length].cpu(), pad, known.chunks[n])
                for n, pad in enumerate(pads)
            ]
            return sum(self._store_row(shape, cache, n, row) for n, row in enumerate(rows))
        except Exception as error:
            self._say_why(error)
            return 0

    # generate

    def generate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own, with what is stored of the prompt."""
        try:
            call = Call(self.model, self._own_generate, args, kwargs)
            prompt = self._prompt(call.input_ids, call.attention_mask, call.repeats)
            note(prompt.cache, prompt.columns, prompt.mask.shape[1] - prompt.columns)
        except Exception as error:  # a fault of ours must not be the caller's
            self._say_why(error)
            return self._own_generate(*args, **kwargs)
        output = self._with_prefix(call, prompt)
        if output is _AGAIN:
            return self._own_generate(**call.arguments)
        try:
            self._store_output(prompt, output, call.eos)
        except Exception as error:
            self._say_why(error)
        try:
            stop_noting(prompt.cache)
        except Exception as error:
            self._say_why(error)
        return output

    def _with_prefix(self, call: Call, prompt: _Prompt) -> Any:
        """Generate's output, or _AGAIN where it fails with our cache before any token is out."""
        cache = {"attention_mask": prompt.mask, self._cache_argument: prompt.cache}
        try:
            return self._own_generate(**{**call.arguments, **cache})
        except Exception as error:
            if call.any_token or prompt.cache.get_seq_length() > prompt.mask.shape[1]:
                raise
            self._say_why(error, "a failure with a cache")
        call.again()
        return _AGAIN

    @property
    def _own_generate(self) -> Any:
        """What the model would have for `generate` without us."""
        if self._own is not None:
            return self._own
        return types.MethodType(type(self.model).generate, self.model)

    def _say_why(self, error: Exception, what: str = "an unexpected") -> None:
        refused = isinstance(error, NotCacheable)
        self._say(str(error) if refused else f"{what} {described(error)}")

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            name = type(self.model).__name__
            log.warning("%s generates without cached KV where there is %s", name, reason)

    def _current(self) -> Shape:
        """What the model's KV is now."""
        if "prepare_inputs_for_generation" in self.model.__dict__:
            raise NotCacheable("inputs that a wrapper prepares within generate")
        identity = self._observer.identity()
        self._attached_to = self._attached_to or identity
        layers = _remembered(self._layers, identity.frame, self._try_out)
        if isinstance(layers, NotCacheable):
            raise NotCacheable(*layers.args)
        return _remembered(self._shapes, identity, lambda: self._shape(identity, layers))

    def _try_out(self) -> Layers | NotCacheable:
        """What the layers keep, unless their KV does not stand for its prefix."""
        try:
            layers = Layers.of(self.model, self._cache_argument)
            Trial(self.model, self._cache_argument, self._takes_positions).run()
        except NotCacheable as reason:
            return reason
        except Exception as error:
            return NotCacheable(f"a model that does not go on from a cache ({described(error)})")
        return layers

    def _shape(self, identity: Identity, layers: Layers) -> Shape:
        """Its namespace: under the name that other engines know while the model is what it was."""
        if self._share_as and identity == self._attached_to and not has_adapter(self.model):
            config = self.model.config.get_text_config(decoder=True)
            namespace = shared_namespace(self._cache, self._share_as, config, layers.layout)
        else:
            namespace = self._cache.namespace(
                model=type(self.model).__name__,
                layout=layers.layout,
                weights=Weights(digest=identity.whole.hex()),
                tenant=self._tenant,
            )
        return Shape(identity, namespace, layers.devices)

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
        cache = filled(self.model, prefix, columns)
        note(cache, columns)
        self._known[cache] = _Known(shape.identity, known)
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
        for chunk in self._cache.load(hit, shared=True):
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
        if prompt.cache.get_seq_length() != sequences.shape[1] - 1:
            raise NotCacheable("a generate that does not put each token into its cache")
        width = prompt.mask.shape[1]
        rows = []
        for n, pad in enumerate(prompt.pads):
            end = sequences.shape[1] - 1
            for column in range(width, end):  # what follows a row's end is padding
                if int(sequences[n, column]) in eos:
                    end = column + 1
                    break
            rows.append(_Row(sequences[n, pad:end], pad, prompt.known[n]))
        size = self._cache.chunk_size
        if not any(len(row.tokens) // size > row.known for row in rows):
            return
        if self._observer.identity() != prompt.shape.identity:
            raise NotCacheable("a model that changed while it computed")
        for n, row in enumerate(rows):
            self._store_row(prompt.shape, prompt.cache, n, row)

    def _store_row(self, shape: Shape, cache: DynamicCache, number: int, row: _Row) -> int:
        keys = self._cache.keys(shape.namespace, row.tokens)
        size = self._cache.chunk_size

        @whole
        def gather(index: int, out: Tensors) -> None:
            start = row.pad + index * size
            for layer, part, tensor in shape.parts(out):
                source = columns_of(cache.layers[layer], part, number, start, start + size)
                copy_exact(tensor, source)

        return self._cache.store(shape.namespace, keys, gather, start=row.known)


def _remembered(known: dict[K, V], key: K, learn: Callable[[], V]) -> V:
    """What is known of a key, or learned now; what nobody asked for longest is forgotten."""
    value = known.pop(key, None) or learn()
    known[key] = value
    while len(known) > IDENTITIES:
        known.pop(next(iter(known)), None)
    return value


class _Known(NamedTuple):
    """What computed a cache's KV, and how many chunks of each row are stored."""

    identity: Identity
    chunks: list[int]


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
