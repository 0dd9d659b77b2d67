"""Hooks, of a module and of all modules, and what they hold.

A model that has one may be refused at once: a hook may want to see the whole prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from tests.connectors.transformers.mutations import first, mutation, output


def _double(module: Any, args: Any, out: Any) -> Any:
    return out * 2


def _double_input(module: Any, args: Any) -> Any:
    return (args[0] * 2, *args[1:])


def _double_with_kwargs(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return out * 2


def _scaled(factor: float, module: Any, args: Any, out: Any) -> Any:
    return out * factor


def _add(module: Any, args: Any, out: Any) -> Any:
    return out + 1


@mutation()
def forward_hook(model: Any) -> None:
    output(model).register_forward_hook(_double)


@mutation()
def forward_hook_with_kwargs(model: Any) -> None:
    output(model).register_forward_hook(_double_with_kwargs, with_kwargs=True)


@mutation()
def forward_hook_always_called(model: Any) -> None:
    output(model).register_forward_hook(_double, always_call=True)


@mutation()
def forward_pre_hook(model: Any) -> None:
    output(model).register_forward_pre_hook(_double_input)


@mutation()
def forward_pre_hook_with_kwargs(model: Any) -> None:
    def scale(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 2}

    first(model).self_attn.register_forward_pre_hook(scale, with_kwargs=True)


@mutation()
def hook_of_the_model(model: Any) -> None:
    """It moves what the whole model is asked."""

    def other_tokens(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "input_ids": (kwargs["input_ids"] + 1) % 256}

    model.register_forward_pre_hook(other_tokens, with_kwargs=True)


@mutation()
def hook_on_the_embedding(model: Any) -> None:
    model.get_input_embeddings().register_forward_hook(_double)


@mutation()
def hook_put_into_the_dict(model: Any) -> None:
    output(model)._forward_hooks[123456] = _double


@mutation()
def hook_that_is_partial(model: Any) -> None:
    output(model).register_forward_hook(functools.partial(_scaled, 3.0))


@mutation(refused=True)
def hook_that_is_a_method(model: Any) -> Iterator[Any]:
    class Steer:
        factor = 1.0

        def hook(self, module: Any, args: Any, out: Any) -> Any:
            return out * self.factor

    steer = Steer()
    output(model).register_forward_hook(steer.hook)
    yield
    steer.factor = 2.0


@mutation(refused=True)
def value_in_a_hooks_closure(model: Any) -> Iterator[Any]:
    factor = 1.0

    def hook(module: Any, args: Any, out: Any) -> Any:
        return out * factor

    output(model).register_forward_hook(hook)
    yield
    factor = 2.0


@mutation(refused=True)
def vector_in_a_hooks_closure(model: Any) -> Iterator[Any]:
    vector = torch.zeros(output(model).out_features, dtype=output(model).weight.dtype)
    output(model).register_forward_hook(lambda module, args, out: out + vector)
    yield
    vector.data.fill_(0.5)


@mutation(refused=True)
def large_vectors_in_a_hooks_closure(model: Any) -> Iterator[Any]:
    vectors = torch.zeros(256, output(model).out_features, dtype=output(model).weight.dtype)
    output(model).register_forward_hook(lambda module, args, out: out + vectors[131])
    yield
    vectors.data[131, 77] = 1


@mutation(refused=True)
def hooks_in_another_order(model: Any) -> Iterator[Any]:
    output(model).register_forward_hook(_double)
    output(model).register_forward_hook(_add)
    yield
    output(model)._forward_hooks.move_to_end(next(iter(output(model)._forward_hooks)))


@mutation(refused=True)
def hook_prepended(model: Any) -> Iterator[Any]:
    output(model).register_forward_hook(_double)
    yield
    output(model).register_forward_hook(_add, prepend=True)


@mutation(refused=True)
def hook_removed(model: Any) -> Iterator[Any]:
    handle = output(model).register_forward_hook(_double)
    yield
    handle.remove()


@mutation(refused=True)
def hook_moved_to_another_layer(model: Any) -> Iterator[Any]:
    handle = output(model).register_forward_hook(_double)
    yield
    handle.remove()
    model.get_decoder().layers[1].self_attn.o_proj.register_forward_hook(_double)


@mutation(refused=True)
def hook_added_twice(model: Any) -> Iterator[Any]:
    output(model).register_forward_hook(_double)
    yield
    output(model).register_forward_hook(_double)


@mutation(refused=True)
def code_of_a_hook(model: Any) -> Iterator[Any]:
    def hook(module: Any, args: Any, out: Any) -> Any:
        return out

    output(model).register_forward_hook(hook)
    yield
    hook.__code__ = (lambda module, args, out: out * 2).__code__


@mutation()
def global_forward_hook(model: Any) -> Iterator[Any]:
    yield
    target = output(model)
    handle = register_module_forward_hook(
        lambda module, args, out: out * 2 if module is target else out
    )
    yield
    handle.remove()


@mutation()
def global_forward_pre_hook(model: Any) -> Iterator[Any]:
    yield
    target = output(model)
    handle = register_module_forward_pre_hook(
        lambda module, args: (args[0] * 2,) if module is target else args
    )
    yield
    handle.remove()


@mutation(refused=True)
def value_in_a_global_hook(model: Any) -> Iterator[Any]:
    target, factor = output(model), 1.0
    handle = register_module_forward_hook(
        lambda module, args, out: out * factor if module is target else out
    )
    yield
    factor = 2.0
    yield
    handle.remove()


@mutation()
def steering_vector(model: Any) -> None:
    """As tools for steering put them: a hook that adds along a direction."""
    torch.manual_seed(3)
    direction = torch.randn(output(model).out_features).to(output(model).weight.dtype)

    def hook(module: Any, args: Any, out: Any) -> Any:
        return out + direction

    model.get_decoder().layers[0].register_forward_hook(hook)


@mutation()
def ablation_of_a_head(model: Any) -> None:
    def hook(module: Any, args: Any) -> Any:
        kept = args[0].clone()
        kept[..., :32] = 0
        return (kept,)

    output(model).register_forward_pre_hook(hook)


@mutation()
def ablation_of_a_direction(model: Any) -> None:
    """The direction is projected out of what every layer gives."""
    torch.manual_seed(3)
    way = torch.nn.functional.normalize(torch.randn(256), dim=0).to(output(model).weight.dtype)
    for layer in model.get_decoder().layers:
        layer.register_forward_hook(lambda module, args, out: out - (out @ way)[..., None] * way)
