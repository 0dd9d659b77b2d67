"""Every tuner of PEFT: added, switched, disabled, changed, merged, unmerged; and virtual tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import peft
import torch

from tests.connectors.transformers.mutations import add, first, mutation
from tests.connectors.transformers.tiny import PROMPT

ALL = {"target_modules": ["q_proj", "o_proj"]}
TUNERS: dict[str, dict[str, Any]] = {
    "AdaLora": {**ALL, "total_step": 10}, "Beft": {}, "BOFT": ALL, "C3A": ALL, "Deft": ALL,
    "Delora": ALL, "FourierFT": ALL, "Frod": ALL, "Glora": ALL, "Gralora": ALL, "Hira": ALL,
    "HRA": ALL, "IA3": {**ALL, "feedforward_modules": []}, "Lily": ALL, "LNTuning": {},
    "LoHa": ALL, "LoKr": ALL, "Lora": ALL, "Miss": ALL, "OFT": ALL, "OSF": ALL, "Peanut": ALL,
    "Psoft": ALL, "Pvera": ALL, "RandLora": ALL, "Road": ALL, "Shira": ALL, "Supertuning": ALL,
    "TinyLora": ALL, "UniLora": ALL, "VBLoRA": ALL, "Vera": ALL, "WaveFT": ALL,
    "TrainableTokens": {"token_indices": PROMPT[0, 8:12].tolist()},
}  # fmt: skip
ALONE = {"AdaLora", "OSF", "Frod"}
"""They take one adapter."""
NOT_MERGED = {"Beft", "Lily", "OSF"}
"""They cannot be merged, or not unmerged."""
REFUSED = {"Lily"}
"""It looks at all tokens before it treats the first: the mean of what its router says."""


def _tuned(model: Any, kind: str, **more: Any) -> Any:
    """The model with an adapter that does something."""
    torch.manual_seed(1)
    settings = {"task_type": "CAUSAL_LM", **TUNERS.get(kind, {}), **more}
    tuned = peft.get_peft_model(model, getattr(peft, f"{kind}Config")(**settings))
    return _noisy(tuned.eval())


def _noisy(tuned: Any) -> Any:
    """All that can be trained, moved: many adapters do nothing when they are new."""
    for parameter in tuned.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.3)
    return tuned


def _added(kind: str, model: Any) -> Iterator[Any]:
    yield
    yield _tuned(model, kind)


def _disabled(kind: str, model: Any) -> Iterator[Any]:
    tuned = _tuned(model, kind)
    yield tuned
    with tuned.disable_adapter():
        yield tuned


def _switched(kind: str, model: Any) -> Iterator[Any]:
    tuned = _tuned(model, kind)
    settings = {"task_type": "CAUSAL_LM", **TUNERS[kind]}
    tuned.add_adapter("two", getattr(peft, f"{kind}Config")(**settings))
    tuned.set_adapter("two")
    _noisy(tuned.eval())
    tuned.set_adapter("default")
    yield tuned
    tuned.set_adapter("two")
    yield tuned


def _changed(kind: str, model: Any) -> Iterator[Any]:
    tuned = _tuned(model, kind)
    yield tuned
    _noisy(tuned)


def _merged(kind: str, model: Any) -> Iterator[Any]:
    tuned = _tuned(model, kind)
    yield tuned
    tuned.merge_adapter()


def _unmerged(kind: str, model: Any) -> Iterator[Any]:
    tuned = _tuned(model, kind)
    tuned.merge_adapter()
    yield tuned
    tuned.unmerge_adapter()


CHANGES: dict[str, Callable[[str, Any], Iterator[Any]]] = {
    "added": _added,
    "disabled": _disabled,
    "switched": _switched,
    "changed": _changed,
    "merged": _merged,
    "unmerged": _unmerged,
}
for _number, _kind in enumerate(TUNERS):
    for _turn, (_name, _change) in enumerate(CHANGES.items()):
        rounds = _name in ("merged", "unmerged")  # then only by rounding, if at all
        if hasattr(peft, f"{_kind}Config") and not (
            (_name == "switched" and _kind in ALONE) or (rounds and _kind in NOT_MERGED)
        ):
            add(
                f"{_kind}_{_name}",
                functools.wraps(_change)(functools.partial(_change, _kind)),
                "llama",
                dtypes=("float32",),
                alters=None if rounds else True,
                refused=_kind in REFUSED,
                soak=(_turn - _number) % len(CHANGES) != 0,
            )


# LoRA in more ways, on every kind of model


@mutation()
def lora_added(model: Any) -> Iterator[Any]:
    yield
    yield _tuned(model, "Lora", target_modules=["o_proj"])


@mutation()
def lora_disabled(model: Any) -> Iterator[Any]:
    tuned = _tuned(model, "Lora", target_modules=["o_proj"])
    yield tuned
    with tuned.disable_adapter():
        yield tuned


@mutation()
def lora_merged_and_unloaded(model: Any) -> Iterator[Any]:
    """The adapter is in the weights, and nothing tells of it."""
    yield
    _tuned(model, "Lora", target_modules=["o_proj"]).merge_and_unload()
    yield model


@mutation()
def lora_unloaded(model: Any) -> Iterator[Any]:
    tuned = _tuned(model, "Lora", target_modules=["o_proj"])
    yield tuned
    tuned.unload()
    yield model


@mutation()
def lora_strength(model: Any) -> Iterator[Any]:
    tuned = _tuned(model, "Lora", target_modules=["o_proj"])
    yield tuned
    first(model).self_attn.o_proj.scaling["default"] *= 3


@mutation("llama", "mixtral")
def lora_of_one_layer_deleted(model: Any) -> Iterator[Any]:
    tuned = _tuned(model, "Lora", target_modules=["o_proj"])
    yield tuned
    first(model).self_attn.o_proj = first(model).self_attn.o_proj.base_layer


@mutation("llama", "gemma3")
def lora_deleted_by_name(model: Any) -> Iterator[Any]:
    tuned = _tuned(model, "Lora", target_modules=["o_proj"])
    yield tuned
    tuned.base_model.delete_adapter("default")
    yield model


@mutation("llama")
def lora_of_two_in_a_mixture(model: Any) -> Iterator[Any]:
    tuned = _tuned(model, "Lora", target_modules=["o_proj"])
    tuned.add_adapter("two", peft.LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM"))
    tuned.set_adapter("two")
    _noisy(tuned)
    yield tuned
    tuned.add_weighted_adapter(["default", "two"], [0.3, 0.7], "both", combination_type="linear")
    tuned.set_adapter("both")


@mutation("llama")
def lora_of_two_at_once(model: Any) -> Iterator[Any]:
    tuned = _tuned(model, "Lora", target_modules=["o_proj"])
    tuned.add_adapter("two", peft.LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM"))
    tuned.set_adapter("two")
    _noisy(tuned)
    yield tuned
    tuned.base_model.set_adapter(["default", "two"])


@mutation("llama")
def dora_changed(model: Any) -> Iterator[Any]:
    tuned = _tuned(model, "Lora", target_modules=["o_proj"], use_dora=True)
    yield tuned
    magnitude = first(model).self_attn.o_proj.lora_magnitude_vector["default"]
    magnitude.weight.data.mul_(1.5)


@mutation("llama")
def lora_on_the_embedding(model: Any) -> Iterator[Any]:
    tuned = _tuned(model, "Lora", target_modules=["embed_tokens"])
    yield tuned
    _noisy(tuned)


@mutation("llama")
def lora_with_a_saved_module(model: Any) -> Iterator[Any]:
    """A whole layer that is trained beside the adapter."""
    tuned = _tuned(model, "Lora", target_modules=["q_proj"], modules_to_save=["o_proj"])
    yield tuned
    first(model).self_attn.o_proj.modules_to_save["default"].weight.data.mul_(1.5)


@mutation("llama")
def lora_per_row_of_a_batch(model: Any) -> Iterator[Any]:
    """The adapter is an argument of generate."""
    tuned = _tuned(model, "Lora", target_modules=["o_proj"])
    yield tuned
    yield _with(tuned, adapter_names=["__base__"])


@mutation("llama")
def lora_activated(model: Any) -> Iterator[Any]:
    """aLoRA: it acts from its invocation tokens on."""
    tuned = _tuned(
        model, "Lora", target_modules=["o_proj"], alora_invocation_tokens=PROMPT[0, 20:22].tolist()
    )
    yield
    yield tuned


@mutation("llama")
def adaption_prompt(model: Any) -> Iterator[Any]:
    yield
    yield _tuned(model, "AdaptionPrompt", adapter_len=4, adapter_layers=2)


@mutation("llama", refused=True)
def poly_of_another_task(model: Any) -> Iterator[Any]:
    """Which adapter it is, an argument says."""
    settings = {"n_tasks": 2, "n_skills": 2, "n_splits": 1, "r": 4, **ALL}
    tuned = _tuned(model, "Poly", **settings)
    yield _with(tuned, task_ids=torch.tensor([0]))
    yield _with(tuned, task_ids=torch.tensor([1]))


# Virtual tokens


def _with(tuned: Any, **more: Any) -> Any:
    return SimpleNamespace(generate=functools.partial(tuned.generate, **more))


VIRTUAL: dict[str, dict[str, Any]] = {
    "PromptTuning": {"num_virtual_tokens": 4},
    "PromptEncoder": {"num_virtual_tokens": 4, "encoder_hidden_size": 32},
    "PrefixTuning": {"num_virtual_tokens": 4},
    "Cartridge": {"num_virtual_tokens": 4},
    "MultitaskPromptTuning": {"num_virtual_tokens": 4, "num_tasks": 2},
}


def _virtual(kind: str, model: Any) -> tuple[Any, Any]:
    """The tuned model, and how it is asked."""
    tuned = _tuned(model, kind, **VIRTUAL[kind])
    task = {"task_ids": torch.tensor([0])} if kind.startswith("Multitask") else {}
    return tuned, _with(tuned, **task)


def _virtual_added(kind: str, model: Any) -> Iterator[Any]:
    yield
    yield _virtual(kind, model)[1]


def _virtual_changed(kind: str, model: Any) -> Iterator[Any]:
    tuned, asked = _virtual(kind, model)
    yield asked
    for encoder in tuned.prompt_encoder.values():
        for parameter in encoder.parameters():
            parameter.data.mul_(-2)


def _virtual_asked_without(kind: str, model: Any) -> Iterator[Any]:
    """First with the virtual tokens, then the base alone."""
    tuned, asked = _virtual(kind, model)
    yield asked
    yield tuned.get_base_model()


for _kind in VIRTUAL:
    for _change in (_virtual_added, _virtual_changed, _virtual_asked_without):
        if hasattr(peft, f"{_kind}Config"):
            add(
                f"{_kind}{_change.__name__.removeprefix('_virtual')}",
                functools.wraps(_change)(functools.partial(_change, _kind)),
                "llama",
                dtypes=("float32",),
                alters=None,  # virtual tokens move columns
                refused=_change is not _virtual_added,
            )
