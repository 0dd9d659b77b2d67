"""Tiny models of four kinds, and what a call of generate leaves behind."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import tqdm
import transformers
from transformers.cache_utils import DynamicSlidingWindowLayer

from lmcache_core import CacheEngine

tqdm.tqdm.monitor_interval = 0  # who shows his progress starts no thread that watches it
CHUNK = 16
PROMPT_TOKENS = 64
PREFIX = 48
"""Columns of the prompt that can be reused: whole chunks, and one token is left to compute."""
VOCABULARY = 256
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,  # so that a projection is a large tensor, over 64 KiB
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}
WINDOW = {
    "head_dim": 64,
    "sliding_window": 24,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 64,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", MOE),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", WINDOW),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", MLA),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMBINATIONS = [(family, dtype) for family in FAMILIES for dtype in DTYPES]


def build(family: str, dtype: str = "float32") -> Any:
    """A tiny model with random weights, the same every time."""
    config, model, more = FAMILIES[family]
    settings = getattr(transformers, config)(**{**COMMON, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = getattr(transformers, model)(settings)
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.dim() > 1:  # wide enough that what is computed depends on the tokens
                    parameter.normal_(0, 0.06)
    return built.to(DTYPES[dtype]).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=generator)


PROMPT = tokens(1, PROMPT_TOKENS)


def config() -> dict[str, Any]:
    tier = {"backend": "local_cpu", "capacity": "512MiB"}
    return {"chunk_size": CHUNK, "tiers": [tier]}


def counted(cache: CacheEngine, event: str) -> int:
    """Chunks of all tiers that were stored or loaded so far."""
    return sum(n for key, n in cache.stats().items() if key[0] == event)


class Answer(NamedTuple):
    """A call's tokens, and the KV that it used."""

    tokens: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor, bool]]
    """Keys, values, and whether the layer forgets what leaves its window."""

    @classmethod
    def of(cls, model: Any, prompt: torch.Tensor = PROMPT, **more: Any) -> Answer:
        torch.manual_seed(1)
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=2,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            **more,
        )
        layers = [
            (layer.keys.clone(), layer.values.clone(), isinstance(layer, DynamicSlidingWindowLayer))
            for layer in out.past_key_values.layers
        ]
        return cls(out.sequences.clone(), layers)

    def __repr__(self) -> str:
        return f"Answer({self.tokens[:, -2:].tolist()}, {len(self.layers)} layers)"

    def same(self, other: Answer) -> bool:
        """Bit for bit, the tokens and all KV."""
        return torch.equal(self.tokens, other.tokens) and self._same_kv(other, None)

    def same_prefix(self, other: Answer) -> bool:
        """Bit for bit, the KV of the columns that can be reused, where layers still have it."""
        return self._same_kv(other, PREFIX)

    def close(self, other: Answer) -> bool:
        """All KV, but for how float32 rounds."""
        pairs = zip(self.layers, other.layers, strict=True)
        return all(
            torch.allclose(mine[part], theirs[part], rtol=1e-3, atol=1e-3)
            for mine, theirs in pairs
            for part in (0, 1)
        )

    def _same_kv(self, other: Answer, columns: int | None) -> bool:
        if len(self.layers) != len(other.layers):
            return False
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if columns is not None and mine[2]:
                continue
            for part in (0, 1):
                a, b = mine[part][:, :, :columns], theirs[part][:, :, :columns]
                if a.dtype != b.dtype or not torch.equal(_bits(a), _bits(b)):
                    return False
        return True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """So that NaN is NaN, and -0 is not 0."""
    return tensor.contiguous().view(torch.uint8)
