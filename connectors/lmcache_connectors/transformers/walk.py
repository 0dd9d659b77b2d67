"""The walk: everything that hangs on a model's modules, and the code that computes with it.

By content: values, what containers and objects hold, the bytecode of functions with their
defaults and closures, and what these reach by name. Tensors and other buffers are listed, for
their bytes are read at every call. No number of an object, no path and nothing of the process is
in it, so that a copy of a model, or the same model in another process, has the same.
"""

from __future__ import annotations

import collections
import contextvars
import ctypes
import decimal
import enum
import functools
import logging
import operator
import os
import pathlib
import re
import threading
import types
import typing
import weakref
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import xxhash
from transformers import PretrainedConfig
from transformers.utils.generic import GeneralInterface

from lmcache_connectors.transformers.code import code_token, home_of
from lmcache_connectors.transformers.guards import MISSING, Guards
from lmcache_connectors.transformers.reach import ENTRIES, Members, function_parts

_VALUES = (
    type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range,
    slice, decimal.Decimal, torch.dtype, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
_NOT_READ = frozenset(
    {
        "__getstate__", "generate", "generation_config", "gradient_checkpointing",
        "_gradient_checkpointing_func",
        "_compiled_call", "_compiled_call_impl", "_backward_hooks", "_backward_pre_hooks",
        "_is_full_backward_hook", "_state_dict_hooks", "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
        "_non_persistent_buffers_set", "_forward_hooks", "_forward_pre_hooks",
        "_forward_hooks_always_called", "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs", "warnings_issued", "name_or_path", "hf_device_map",
        "_previous_max_cache_length", "_output_capturing_hooks_installed", "_require_grads_hook",
        "_require_grads_hooks", "_is_hf_initialized", "training"
    }
)  # fmt: skip
"""What torch and Transformers keep on a module for training, saving and compiling, and no forward
of theirs reads; where other code names it, it is looked at. (Forward hooks are judged by
themselves.)"""
_NOT_READ_OF_CONFIG = frozenset(
    {
        "_name_or_path", "name_or_path", "base_model_name_or_path", "_commit_hash", "revision",
        "transformers_version", "peft_version", "auto_mapping", "architectures", "dtype",
        "torch_dtype", "use_cache", "return_dict", "output_hidden_states", "_output_attentions",
        "inference_mode"
    }
)  # fmt: skip
"""Where a model came from, and what its calls give back."""
_NOT_READ_OF_TENSOR = frozenset(("_is_hf_initialized", "_backward_hooks", "grad"))
_OPAQUE = (
    logging.Logger, type(threading.Lock()), type(threading.RLock()), torch.Generator,
    pathlib.PurePath,
)  # fmt: skip
"""Known not to decide what is computed."""
_BY_NAME = (
    types.BuiltinFunctionType, types.MethodWrapperType, types.WrapperDescriptorType,
    types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType,
    types.MemberDescriptorType,
)  # fmt: skip
_KNOWN_BY_CLASS = ("torch._dynamo", "torch._inductor", "torch._ops", "typing")
"""Modules whose objects are not looked into: compiled code, operators, annotations."""
_DROPS_NOTHING = (
    "torch.nn.modules.linear", "torch.nn.modules.sparse", "torch.nn.modules.container",
    "torch.nn.modules.normalization", "torch.nn.modules.activation",
    "transformers.activations", "peft.",
)  # fmt: skip
"""Where `training` makes no difference; peft's modules are in training mode when they are new."""


class Walk:
    """One walk over a model: `digest` of what was found, `refusals` why that does not suffice."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.guards = Guards()
        self.tensors: list[torch.Tensor] = []
        self.buffers: list[Any] = []
        self.environment: dict[str, str | None] = {}
        self.names = set(ENTRIES)
        """What the code names that was met so far."""
        self.foreign: set[str] = set()
        """The same of code that is neither Transformers' nor PEFT's."""
        self.by_text = False
        """Whether such code finds things by names in texts, which it may put together."""
        self.chosen: set[str] = set()
        """Names of implementations in configs."""
        self.members = Members()
        self._refusals: list[str] = []
        self._closed: list[tuple[str, str]] = []
        self._left: list[tuple[str, Any]] = []
        self._attribute = ""
        self._known: dict[int, str] = {}
        self._kept: list[Any] = []
        self._depth = 0
        parts = [self.token(model), self.token(torch.Tensor), *self.members.parts(self)]
        parts += [f"{k} {self.token(v)}" for k, v in self._left if k in self.foreign]
        parts += [f"{name} {value!r}" for name, value in sorted(self.environment.items())]
        self.digest = xxhash.xxh3_128_digest(_encoded(parts))

    def __repr__(self) -> str:
        return f"Walk({self.digest.hex()}, {len(self.tensors)} tensors, {self.guards})"

    @property
    def refusals(self) -> list[str]:
        """Why KV cannot be reused. An object that nobody can look into is a reason where code
        names the attribute that holds it."""
        closed = [what for name, what in self._closed if not name or name in self.names]
        return [*self._refusals, *(f"an object that nobody understands ({e})" for e in closed)]

    def refuse(self, reason: str) -> None:
        """Note a reason, once."""
        if reason not in self._refusals:
            self._refusals.append(reason)

    def token(self, x: Any) -> str:
        """What an object is: a value in words, or a digest of what it holds."""
        kind = type(x)
        if kind in _VALUES:
            return f"{kind.__name__} {x!r}"
        known = self._known.get(id(x))
        if known is not None:
            return known
        self._known[id(x)] = f"within itself, {self._depth}"
        self._kept.append(x)
        self._depth += 1
        token = xxhash.xxh3_128_hexdigest(_encoded(_look(x, self)))
        self._depth -= 1
        self._known[id(x)] = token
        return token

    def pairs(
        self, items: Iterable[tuple[Any, Any]], leave: frozenset[str] = frozenset()
    ) -> Iterator[str]:
        """Names with values."""
        for key, value in items:
            if key not in leave:
                yield f"{self.token(key)}: {self.token(value)}"

    def closed(self, x: Any) -> str:
        """An object that has nothing to look at."""
        name = f"{home_of(type(x))}.{type(x).__qualname__}"
        self._closed.append((self._attribute, name))
        return name

    def module_parts(self, module: torch.nn.Module) -> Iterator[str]:
        """A module's class and attributes; its parameters, buffers and parts are among these."""
        yield self.token(type(module))
        self._judge_hooks(module)
        if module.training and _drops(module):
            self.refuse("a model in training mode")
        for name, value in self.guards.state(module):
            if name in _NOT_READ:
                self._left.append((name, value))
                continue
            outer, self._attribute = self._attribute, "" if name.startswith("_") else name
            yield f"{name} {self.token(value)}"
            self._attribute = outer

    def _judge_hooks(self, module: torch.nn.Module) -> None:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for _, hook in self.guards.mapping(hooks):
                function = getattr(hook, "func", hook)
                # Transformers' own only collect outputs, and stay once somebody asked for them.
                if not str(getattr(function, "__module__", "")).startswith("transformers."):
                    self.refuse("a forward hook, which may want to see the whole prompt")


def _encoded(parts: Iterable[str]) -> bytes:
    return "\n".join(parts).encode("utf-8", "surrogatepass")


def _drops(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.nn.Dropout):
        return module.p > 0
    return not home_of(type(module)).startswith(_DROPS_NOTHING)


@functools.singledispatch
def _look(x: Any, walk: Walk) -> Iterable[str]:
    """What there is to say of an object."""
    return _object(x, walk)


def _object(x: Any, walk: Walk, leave: frozenset[str] = frozenset()) -> Iterator[str]:
    """Any object: its class, attributes and slots."""
    kind = type(x)
    yield walk.token(kind)
    if kind is object or home_of(kind).startswith(_KNOWN_BY_CLASS):
        return
    if not hasattr(x, "__dict__") and not any(map(_slots, kind.__mro__)):
        yield walk.closed(x)
    yield from _held(x, walk, leave)


def _held(x: Any, walk: Walk, leave: frozenset[str] = frozenset()) -> Iterator[str]:
    """Attributes and slots."""
    slots = [each for base in type(x).__mro__ for each in _slots(base)]
    yield from walk.pairs(walk.guards.state(x), leave)
    for slot in slots:
        value = walk.guards.attribute(x, slot)
        yield f"{slot} {'unset' if value is MISSING else walk.token(value)}"


def _slots(kind: type) -> list[str]:
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    private = [
        f"_{kind.__name__.lstrip('_')}{each}" if each[:2] == "__" and each[-2:] != "__" else each
        for each in names
    ]
    return [each for each in private if each not in ("__dict__", "__weakref__")]


@_look.register
def _(x: torch.nn.Module, walk: Walk) -> Iterable[str]:
    if isinstance(x, torch.jit.ScriptModule):
        return [walk.closed(x)]
    return walk.module_parts(x)


@_look.register
def _(x: torch.Tensor, walk: Walk) -> Iterator[str]:
    walk.tensors.append(x)
    yield f"tensor {len(walk.tensors)}"
    yield walk.token(type(x))
    yield from walk.pairs(
        (k, v) for k, v in walk.guards.state(x)
        if k not in _NOT_READ_OF_TENSOR and not k.startswith("_dynamo")
    )  # fmt: skip


@_look.register(np.ndarray)
@_look.register(bytearray)
@_look.register(memoryview)
@_look.register(array)
def _(x: Any, walk: Walk) -> Iterator[str]:
    if isinstance(x, np.ndarray) and x.dtype == object:
        yield f"objects {x.shape}"
        yield from map(walk.token, walk.guards.items(_Flat(x)))
    else:
        walk.buffers.append(x)
        yield f"buffer {len(walk.buffers)} {getattr(x, 'dtype', '')} {getattr(x, 'shape', '')}"


class _Flat:
    """Items of an array of objects."""

    def __init__(self, x: Any) -> None:
        self._x = x

    def __iter__(self) -> Iterator[Any]:
        return iter(self._x.reshape(-1).tolist())


@_look.register
def _(x: types.FunctionType, walk: Walk) -> Iterable[str]:
    return function_parts(x, walk)


@_look.register
def _(x: types.CodeType, walk: Walk) -> Iterable[str]:
    return [code_token(x)]


@_look.register
def _(x: types.MethodType, walk: Walk) -> Iterable[str]:
    return [walk.token(x.__self__), walk.token(x.__func__)]


@_look.register
def _(x: functools.partial, walk: Walk) -> Iterator[str]:  # type: ignore[type-arg]
    yield from map(walk.token, (x.func, x.args, x.keywords))
    yield from walk.pairs(walk.guards.state(x))


@_look.register
def _(x: type, walk: Walk) -> Iterable[str]:
    return [f"class {walk.members.add(x)}"]


@_look.register(list)
@_look.register(tuple)
@_look.register(collections.deque)
def _(x: Any, walk: Walk) -> Iterator[str]:
    yield f"{walk.token(type(x))} {len(x)}"
    yield from map(walk.token, walk.guards.items(x))
    yield from walk.pairs(walk.guards.state(x) if type(x) not in (list, tuple) else ())


@_look.register(set)
@_look.register(frozenset)
def _(x: Any, walk: Walk) -> Iterator[str]:
    yield f"{walk.token(type(x))} {len(x)}"
    yield from sorted(map(walk.token, walk.guards.items(x)))


@_look.register
def _(x: dict, walk: Walk) -> Iterator[str]:  # type: ignore[type-arg]
    yield f"{walk.token(type(x))} {dict.__len__(x)}"
    yield from walk.pairs(walk.guards.mapping(x))
    if isinstance(x, collections.OrderedDict):  # whose order the dict beneath does not know
        yield from map(walk.token, walk.guards.items(_Order(x)))
    yield from walk.pairs(walk.guards.state(x) if type(x) is not dict else ())


class _Order:
    """Keys of an OrderedDict in their order."""

    def __init__(self, x: collections.OrderedDict[Any, Any]) -> None:
        self._x = x

    def __iter__(self) -> Iterator[Any]:
        return collections.OrderedDict.__iter__(self._x)


@_look.register
def _(x: types.MappingProxyType, walk: Walk) -> Iterator[str]:  # type: ignore[type-arg]
    yield f"{walk.token(type(x))} {len(x)}"
    yield from walk.pairs(walk.guards.proxy(x))


@_look.register
def _(x: GeneralInterface, walk: Walk) -> Iterable[str]:
    for functions in (type(x)._global_mapping, x._local_mapping):
        walk.guards.mapping(functions)
    return [walk.members.add_registry(x)]


@_look.register
def _(x: PretrainedConfig, walk: Walk) -> Iterable[str]:
    walk.chosen |= {v for k, v in vars(x).items() if "implementation" in k and isinstance(v, str)}
    return _object(x, walk, _NOT_READ_OF_CONFIG)


@_look.register(property)
@_look.register(functools.cached_property)
@_look.register(staticmethod)
@_look.register(classmethod)
def _(x: Any, walk: Walk) -> Iterator[str]:
    for name in ("fget", "func", "__func__"):
        if hasattr(x, name):
            yield walk.token(getattr(x, name))


@_look.register
def _(x: contextvars.ContextVar, walk: Walk) -> Iterable[str]:  # type: ignore[type-arg]
    value = walk.guards.variable(x)
    return ["nothing" if value is MISSING else walk.token(value)]


@_look.register
def _(x: weakref.ReferenceType, walk: Walk) -> Iterable[str]:  # type: ignore[type-arg]
    target = x()
    return [walk.token(target)]


@_look.register
def _(x: types.ModuleType, walk: Walk) -> Iterable[str]:
    return [f"module {walk.members.add_module(x, walk)}"]


@_look.register
def _(x: torch.device, walk: Walk) -> Iterable[str]:
    return [f"device {x.type}"]


@_look.register
def _(x: enum.Enum, walk: Walk) -> Iterator[str]:
    yield f"{walk.token(type(x))} {x.name}"
    yield from _held(x, walk)


@_look.register(int)
@_look.register(float)
@_look.register(str)
@_look.register(bytes)
@_look.register(complex)
def _(x: Any, walk: Walk) -> Iterator[str]:
    """A value of a class that somebody derived."""
    plain: Any = next(kind for kind in type(x).__mro__ if kind in _VALUES)
    yield f"{walk.token(type(x))} {plain.__repr__(x)}"
    yield from _held(x, walk)


@_look.register(operator.attrgetter)
@_look.register(operator.itemgetter)
@_look.register(operator.methodcaller)
@_look.register(type(functools._CacheInfo.hits))
def _(x: Any, walk: Walk) -> Iterator[str]:
    kind, arguments = x.__reduce__()[:2]
    walk.names.update(part for each in arguments for part in str(each).split("."))
    yield walk.token(kind)
    yield from map(walk.token, arguments)


@_look.register(ctypes.c_int.__mro__[-2])
def _(x: Any, walk: Walk) -> Iterable[str]:
    return [walk.closed(x)]  # memory of C, which may hold addresses


@_look.register(type(os.environ))
def _(x: Any, walk: Walk) -> Iterable[str]:
    return [type(x).__qualname__]  # the variables that code names are looked up one by one


@_look.register(np.generic)
@_look.register(re.Pattern)
@_look.register(types.UnionType)
@_look.register(types.GenericAlias)
@_look.register(typing.TypeVar)
def _(x: Any, walk: Walk) -> Iterable[str]:
    return [f"{home_of(type(x))}.{type(x).__qualname__} {x!r}"]


def _named(x: Any, walk: Walk) -> Iterable[str]:
    owner = getattr(x, "__self__", None)
    bound = [] if owner is None or isinstance(owner, types.ModuleType) else [walk.token(owner)]
    return [f"{getattr(x, '__module__', '')}.{x.__qualname__}", *bound]


def _nothing(x: Any, walk: Walk) -> Iterable[str]:
    return [type(x).__qualname__]


for _by_name in _BY_NAME:
    _look.register(_by_name, _named)
for _opaque in _OPAQUE:
    _look.register(_opaque, _nothing)
