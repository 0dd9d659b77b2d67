"""What a call of `generate` asks for, and whether it can be served."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from lmcache_connectors.transformers.refusal import NotCacheable

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


class Call:
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
        self._streamer = None
        if self.arguments.get("streamer") is not None:
            self._streamer = self.arguments["streamer"] = Streamed(self.arguments["streamer"])

    @property
    def any_token(self) -> bool:
        """Whether a token has gone to the caller's streamer."""
        return self._streamer is not None and self._streamer.any_token

    def again(self) -> None:
        """The call runs anew."""
        if self._streamer is not None:
            self._streamer.again()

    def _option(self, name: str) -> Any:
        """An option of generation, from wherever generate would take it."""
        values = [self.arguments.get(name), *(getattr(c, name, None) for c in self._configs if c)]
        return next((value for value in values if value is not None), None)

    def _refuse_arguments(self, known: Mapping[str, Any]) -> None:
        understood = {*known, *_generation_options(), "input_ids", "attention_mask", "tokenizer"}
        for name in ("cache", "past_key_values"):
            if self.arguments.get(name) is not None:
                raise NotCacheable("a cache of the caller's own")
        for name, value in self.arguments.items():
            if value is not None and name not in understood:
                raise NotCacheable(f"the argument {name}")

    def _refuse_options(self) -> None:
        for name, what in _ONE_SEQUENCE.items():
            if self._option(name) not in (None, False):
                raise NotCacheable(what)
        if (self._option("num_beams") or 1) > 1:
            raise NotCacheable("beam search")
        # Old checkpoints with sliding windows say "hybrid"; generate takes that for None.
        if self._option("cache_implementation") not in (None, "dynamic", "hybrid"):
            raise NotCacheable(f"a {self._option('cache_implementation')} cache")
        if self._option("output_hidden_states") or self._option("output_attentions"):
            raise NotCacheable("output_hidden_states or output_attentions, of the whole prompt")
        if self._option("use_cache") is False:
            raise NotCacheable("use_cache=False")

    def _check_ids(self) -> None:
        ids = self.input_ids
        whole = isinstance(ids, torch.Tensor) and ids.dtype in (torch.int64, torch.int32)
        if not (whole and ids.dim() == 2 and ids.numel()):
            raise NotCacheable("a prompt that is not token ids [batch, tokens]")

    def _refuse_pads(self) -> None:
        """Without a mask generate guesses one from pad tokens; we do not."""
        pad = self._option("pad_token_id")
        if pad is not None and int(pad) not in self.eos and bool((self.input_ids == pad).any()):
            raise NotCacheable("a pad token in the prompt and no attention_mask")


@functools.cache
def _generation_options() -> frozenset[str]:
    return frozenset(GenerationConfig().to_dict())


def pads_of(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    """Columns of padding on the left of each row."""
    if mask is None:
        return [0] * input_ids.shape[0]
    if mask.shape != input_ids.shape:
        raise NotCacheable(f"an attention_mask of shape {list(mask.shape)}")
    there = mask.cpu() != 0
    pads = (~there).sum(dim=1)
    left = torch.arange(mask.shape[1])[None] >= pads[:, None]
    if not torch.equal(there, left) or int(mask.max()) > 1 or int(pads.max()) == mask.shape[1]:
        raise NotCacheable("padding that is not on the left")
    return [int(pad) for pad in pads]


class Streamed:
    """A caller's streamer, and how much it was given: nothing is put twice."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._puts = 0
        self._skip = 0

    @property
    def any_token(self) -> bool:
        """Whether more than the prompt went out."""
        return self._puts > 1

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each token."""
        if self._skip:
            self._skip -= 1
            return
        self._puts += 1
        self._streamer.put(value)

    def end(self) -> None:
        """As the streamer's."""
        self._streamer.end()

    def again(self) -> None:
        """Generate begins anew: what it puts again has gone out."""
        self._skip = self._puts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streamer, name)
