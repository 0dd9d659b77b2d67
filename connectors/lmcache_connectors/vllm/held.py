"""What a model in a worker is made of: all that decides what it computes, by content.

Every tensor that hangs on its modules, as a parameter, a buffer, an attribute, in a list or in an
object beside it, with all its bytes: packed weights and their scales, the tables of positions. The
numbers that modules hold. The source files of their classes (`code.py`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch

from lmcache_connectors.vllm.code import code_digests, function_digest
from lmcache_core.connector import tensor_digests
from lmcache_core.errors import NoContent

_MEMORY = ("kv_cache",)
"""Attributes that hold KV, not weights."""
_TORCH = frozenset(vars(torch.nn.Module()))
"""What torch keeps of every module itself: its parameters and buffers are asked for by name."""
_VLLMS = (
    *("_do_torchao_reload", "_original_do_torchao_reload"),  # while it reloads weights
    *("compiled", "first_compile", "_compiled_callable"),
    *("aot_compiled_fn", "was_aot_compile_fn_loaded_from_disk"),
)
"""What vLLM notes on a module of what it has done with it, and of where it has it compiled from."""
_NOT_READ = frozenset((*_MEMORY, *_TORCH, *_VLLMS))
_NUMBERS = (float, bool)
_HELPERS = ("vllm.model_executor.", "vllm.v1.attention.")
"""Packages whose objects help modules, and hold weights for them."""


def watch() -> None:
    """Note the content of weights that go where nobody can read them: on a CPU vLLM has oneDNN
    pack those of most layers, and lets go of them. May be called more than once."""
    from vllm import _custom_ops

    for name in ("create_onednn_mm", "create_onednn_scaled_mm"):
        packs = getattr(_custom_ops, name, None)
        if packs is not None and not hasattr(packs, "lmcache_core"):
            setattr(_custom_ops, name, _noted(packs))


def _noted(packs: Any) -> Any:
    @functools.wraps(packs)
    def noted(*arguments: Any, **named: Any) -> Any:
        given = [*arguments, *named.values()]
        digests = tensor_digests(each for each in given if isinstance(each, torch.Tensor))
        packed = packs(*arguments, **named)
        packed.lmcache_core = b"".join(digests)
        return packed

    noted.lmcache_core = True  # type: ignore[attr-defined]
    return noted


def digests(models: Iterable[torch.nn.Module]) -> tuple[dict[str, bytes], int]:
    """Of everything that these models hold, 16 bytes or a number's text by name; and how many bytes
    were read. Raises NoContent."""
    models = list(models)
    found: dict[str, Any] = {}
    walk = _Walk()
    for n, model in enumerate(models):
        found.update((f"{n}.{name}", each) for name, each in walk.module(model))
    known, nbytes = _read(found)
    return known | code_digests(models), nbytes


def adapter_digests(adapter: Any) -> dict[str, bytes]:
    """The same of a LoRA adapter as vLLM has loaded it."""
    walk, found = _Walk(), dict[str, Any]()
    for layer, weights in adapter.loras.items():
        for key, value in vars(weights).items():
            found.update(walk.value(f"{layer}.{key}", value))
    return _read(found)[0]


def _read(found: Mapping[str, Any]) -> tuple[dict[str, bytes], int]:
    """The content of tensors, numbers and what was noted; and the bytes of the tensors."""
    tensors = {name: each for name, each in found.items() if isinstance(each, torch.Tensor)}
    once = {id(tensor): tensor for tensor in tensors.values()}  # tied ones are read once
    known = dict(zip(once, tensor_digests(once.values()), strict=True))
    digests = {name: each for name, each in found.items() if isinstance(each, bytes)}
    digests |= {name: repr(each).encode() for name, each in found.items() if type(each) in _NUMBERS}
    digests |= {name: known[id(tensor)] for name, tensor in tensors.items()}
    return digests, sum(tensor.nbytes for tensor in once.values())


class _Walk:
    """Visits what hangs on modules, each thing once: yields tensors, numbers, and the content of
    what cannot be read any more, by name."""

    def __init__(self) -> None:
        self._modules: set[torch.nn.Module] = set()
        self._objects: set[int] = set()

    def module(self, model: torch.nn.Module) -> _Found:
        """What LoRA wraps around a layer belongs to the adapters."""
        for path, module in list(model.named_modules(self._modules)):
            path = path.replace(".base_layer", "")
            yield from ((f"{path}.{key}", each) for key, each in module._parameters.items())
            yield from ((f"{path}.{key}", each) for key, each in module._buffers.items())
            for key, value in vars(module).items() if not _of_lora(module) else ():
                if key not in _NOT_READ:
                    yield from self.value(f"{path}.{key}", value)
                    yield from self._helper(f"{path}.{key}", value)
                    if function := function_digest(value):
                        yield f"{path}.{key}()", function

    def value(self, name: str, value: Any) -> _Found:
        """A tensor, a number, a plain container of more; a module that is no part of another."""
        if isinstance(value, torch.Tensor) or type(value) in _NUMBERS:
            yield name, value
        elif isinstance(value, Mapping | list | tuple):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, each in items:
                yield from self.value(f"{name}[{key}]", each)
        elif isinstance(value, torch.nn.Module) and value not in self._modules:
            yield from ((f"{name}.{key}", each) for key, each in self.module(value))

    def _helper(self, name: str, value: Any) -> _Found:
        """The tensors of an object of vLLM's that helps a module, its quantization method, say, or
        of a function that has some at hand. Raises NoContent where weights cannot be read."""
        if isinstance(value, torch.ScriptObject):
            raise NoContent(f"{name}: {type(value).__name__}")
        if hasattr(value, "handler_tensor"):
            if not hasattr(value, "lmcache_core"):
                raise NoContent(f"{name}: weights that oneDNN has packed before we looked")
            yield name, value.lmcache_core
        elif id(value) not in self._objects and (parts := _parts(value)):
            self._objects.add(id(value))
            for key, each in parts:
                found = self.value(f"{name}.{key}", each)
                yield from (part for part in found if isinstance(part[1], torch.Tensor))
                yield from self._helper(f"{name}.{key}", each)


_Found = Iterator[tuple[str, Any]]


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What a helper holds, by name; nothing of what is none."""
    if isinstance(value, FunctionType):
        return list(inspect.getclosurevars(value).nonlocals.items())
    if not type(value).__module__.startswith(_HELPERS) or isinstance(value, torch.nn.Module | type):
        return []
    held = getattr(value, "__dict__", {}).items()
    return [(key, each) for key, each in held if key not in _MEMORY]


def _of_lora(module: torch.nn.Module) -> bool:
    return any(kind.__module__.startswith("vllm.lora.") for kind in type(module).__mro__)
