"""Every causal language model of Transformers, tiny: is it served, and does it answer as without us?

    python -m tests.connectors.transformers.families [NAME ...] [--write]

Each is built with small sizes and random weights, attached, and asked: a prompt and another with
the same beginning, a follow-up of its own answer, a long prompt, a batch with padding on the left.
Tokens and logits are those of generate without us, or it is a difference. `--write` puts the table
into docs/transformers.md.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

import lmcache_core
from lmcache_connectors.transformers import attach

PAGE = Path(__file__).parents[3] / "docs" / "transformers.md"
START, END = (
    "<!-- families: written by make families -->",
    "<!-- end of families -->",
)
CHUNK = 8
VOCABULARY = 128
MOST_PARAMETERS = 150_000_000
TOLERANCE = 1e-4
"""Of the standard deviation of the logits; float32 rounds by less than a tenth of that."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "n_inner": 48, "ffn_hidden_size": 48, "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4,
    "num_layers": 4, "encoder_layers": 4, "decoder_layers": 4, "num_attention_heads": 4,
    "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_seq_len": 512,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 16, "moe_topk": 2,
    "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "qk_head_dim": 12,
    "embedding_size": 32, "word_embed_proj_dim": 32, "input_embedding_size": 32,
    "state_size": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2,
    "sliding_window": 16, "attention_window_size": 16,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_dt_rank": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_mamba_heads": 4,
    "n_shared_experts": 1, "rotary_dim": 4, "laurel_rank": 8,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Sizes by the names that configs use; each takes those that it has."""

MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2,
        },
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "mpt": {"use_cache": True},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2, "mamba_ngroups": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What a family needs besides."""


KINDS = ("differs", "served", "refused", "fails without us", "not built")


class Outcome(NamedTuple):
    """What became of a family."""

    name: str
    kind: str
    """One of KINDS."""
    why: str = ""


# Building


def config_of(name: str, config: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A config of small sizes, its parts' too."""
    known = {*inspect.signature(config.__init__).parameters, *config.attribute_map.values()}
    settings = {k: v for k, v in SIZES.items() if k in known}
    if "qk_rope_head_dim" in settings:  # latent attention: what is rotated, and no groups
        settings.update(head_dim=SIZES["qk_rope_head_dim"], num_key_value_heads=4)
    more = MORE.get(name, {})
    if config.sub_configs.keys() - more.keys():
        default = config()
        for part in config.sub_configs:
            inner = getattr(default, part, None)
            if isinstance(inner, PreTrainedConfig):
                settings[part] = config_of(inner.model_type, type(inner)).to_dict()
    return config(**{**_layers(config, settings), **more, **changes})


def _layers(config: type[PreTrainedConfig], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with every type of layer that the family has."""
    with contextlib.suppress(Exception):
        types = config().layer_types
        if types and "layer_types" in inspect.signature(config.__init__).parameters:
            layers = settings.get("num_hidden_layers", 4)
            return {**settings, "layer_types": _shortened(types, layers)}
    return settings


def _shortened(types: Sequence[str], layers: int) -> list[str]:
    """Every type of layer that the model has."""
    kinds = list(dict.fromkeys(types))
    return [kinds[n % len(kinds)] for n in range(layers)]


def build(name: str, **changes: Any) -> Any:
    model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]
    model = model[0] if isinstance(model, tuple) else model
    config = model.config_class or CONFIG_MAPPING[name]  # of a composite model's text alone
    torch.manual_seed(0)
    built = model(config_of(name, config, **changes))
    parameters = sum(parameter.numel() for parameter in built.parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters} parameters")
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:  # wide enough that what is computed depends on the tokens
                parameter.normal_(0, 0.1)
    return built.eval()


# Asking


class Asked(NamedTuple):
    """One call: its prompts, and what came."""

    tokens: torch.Tensor
    logits: torch.Tensor


def _tokens(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def ask(model: Any, ids: torch.Tensor, padding: int = 0) -> Asked:
    """`padding`: columns on the left of the last row."""
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    torch.manual_seed(0)  # some draw while they compute
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Asked(out.sequences, torch.stack(out.logits))


def conversation(model: Any) -> Iterator[tuple[str, Asked]]:
    """The calls, by what they try."""
    document = _tokens(1, 40, seed=1)
    first = ask(model, document)
    yield "a prompt", first
    yield "a prefix", ask(model, torch.cat([document[:, :33], _tokens(1, 9, seed=2)], 1))
    yield "a follow-up", ask(model, torch.cat([first.tokens, _tokens(1, 5, seed=3)], 1))
    long = _tokens(1, 150, seed=4)
    yield "a long prompt", ask(model, long)
    yield "a long prefix", ask(model, torch.cat([long[:, :120], _tokens(1, 12, seed=5)], 1))
    padded = torch.cat([torch.zeros(1, 7).long(), document[:, :33]], 1)
    yield "a batch", ask(model, torch.cat([document, padded]), padding=7)
    yield "a batch again", ask(model, torch.cat([document, padded]), padding=7)


def _differs(got: Asked, want: Asked) -> str:
    if not torch.equal(got.tokens, want.tokens):
        return "tokens"
    spread = float(want.logits[torch.isfinite(want.logits)].float().std()) or 1.0
    close = torch.allclose(got.logits, want.logits, rtol=0, atol=TOLERANCE * spread, equal_nan=True)
    return "" if close else "logits"


class _Reasons(logging.Handler):
    """What the connector says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    handler, log = _Reasons(), logging.getLogger("lmcache_core")
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield handler.said
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


def outcome(name: str, **changes: Any) -> Outcome:
    """Build, ask without us, attach, ask again."""
    try:
        built = build(name, **changes)
    except Exception as error:
        return Outcome(name, "not built", _short(error))
    try:
        want = dict(conversation(built))
    except Exception as error:
        return Outcome(name, "fails without us", _short(error))
    tier = {"backend": "local_cpu", "capacity": "64MiB"}
    with (
        _listening() as said,
        lmcache_core.open({"chunk_size": CHUNK, "tiers": [tier]}) as cache,
        attach(built, cache),
    ):
        try:
            got = dict(conversation(built))
        except Exception as error:
            return Outcome(name, "differs", _short(error))
        loaded = sum(n for key, n in cache.stats().items() if key[0] == "loaded")
    different = [f"{what} ({how})" for what in want if (how := _differs(got[what], want[what]))]
    if different:
        return Outcome(name, "differs", ", ".join(different))
    if loaded:
        return Outcome(name, "served", "; ".join(map(_reason, said)))
    return Outcome(name, "refused", _reason(said[0]) if said else "no reason was said")


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"[:160]


def _reason(line: str) -> str:
    found = re.search(r"where there is (.*)", line, re.DOTALL)
    return " ".join((found.group(1) if found else line).split())[:200]


# All of them


def variants(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A family by its name; once more where it decodes only when told to."""
    config = CONFIG_MAPPING[name]
    known = inspect.signature(config.__init__).parameters
    alone = {"is_encoder_decoder": False} if getattr(config, "is_encoder_decoder", False) else {}
    if "is_decoder" not in known:
        yield name, alone
        return
    yield name, {**alone, "is_decoder": True}
    if not alone and known["is_decoder"].default is False:
        yield f"{name} (no decoder)", {"is_decoder": False}


def outcomes(names: Sequence[str] = ()) -> Iterator[Outcome]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        for name, changes in variants(family) if not names or family in names else ():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield outcome(family, **changes)._replace(name=name)


# The table


def table(found: Sequence[Outcome]) -> str:
    """Markdown: how many, which are served, which are refused and why."""
    lines = [f"Transformers {transformers.__version__}: {len(found)} configurations.", ""]
    lines += ["| | how many | which |", "|---|---|---|"]
    rows: dict[str, list[str]] = {}
    for one in sorted(found, key=lambda one: (KINDS.index(one.kind), one.why)):
        rows.setdefault(label(one), []).append(one.name)
    lines += [
        f"| {row} | {len(names)} | {', '.join(sorted(names))} |" for row, names in rows.items()
    ]
    return "\n".join(lines)


def label(one: Outcome) -> str:
    """The row that a family is in."""
    but = "served, but for" if one.kind == "served" else f"{one.kind}:"
    return f"{but} {one.why}".replace("|", "/") if one.why else one.kind


def labels(text: str) -> dict[str, str]:
    """The row of each family, from the table."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: row[0] for row in rows if len(row) == 3 for name in row[2].split(", ")}


def written() -> str:
    """The table as the page has it."""
    text = PAGE.read_text()
    return text[text.index(START) + len(START) : text.index(END)].strip()


def write(text: str) -> None:
    page = PAGE.read_text()
    start, end = page.index(START) + len(START), page.index(END)
    PAGE.write_text(f"{page[:start]}\n{text}\n{page[end:]}")


def main() -> int:
    """Print each outcome as it comes; an error where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", action="store_true", help="the table of all into the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for one in outcomes(options.names):
        print(f"{one.name:32} {one.kind:18} {one.why}", flush=True)
        found.append(one)
    if options.write:
        write(table(found))
    return int(any(one.kind == "differs" for one in found))


if __name__ == "__main__":
    sys.exit(main())
