"""What code reaches by name: globals, modules, members of classes, the environment."""

from __future__ import annotations

import builtins
import functools
import os
import re
import sys
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.generic import GeneralInterface

from lmcache_connectors.transformers.code import (
    code_token,
    is_foreign,
    is_frame,
    is_library,
    named,
)
from lmcache_connectors.transformers.guards import MISSING

if TYPE_CHECKING:
    from lmcache_connectors.transformers.walk import Walk

ENTRIES = frozenset(
    {
        "forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__",
        "__getattribute__", "prepare_inputs_for_generation", "get_input_embeddings"
    }
)  # fmt: skip
"""Where generate enters a module's class; the rest is reached from there by name."""
_OUTSIDE = frozenset(
    {
        "_io", "ctypes", "datetime", "genericpath", "glob", "http", "io", "mmap",
        "multiprocessing", "nt", "pathlib", "pickle", "posix", "random", "requests", "secrets",
        "shelve", "shutil", "socket", "sqlite3", "subprocess", "tempfile", "time", "urllib", "uuid"
    }
)  # fmt: skip
"""Modules that give what hangs on no object: files, clocks, dice, the network."""
_READERS = frozenset(
    {
        "open", "load", "fromfile", "from_file", "memmap", "loadtxt", "genfromtxt", "load_file"
    }
)  # fmt: skip
"""Functions of libraries that read files."""
_OF_FILES = frozenset(
    {
        "exists", "is_dir", "is_file", "iterdir", "read_bytes", "read_text", "readinto",
        "readline", "readlines", "recv"
    }
)  # fmt: skip
"""Methods of paths, files and sockets."""
_BY_TEXT = frozenset({"attrgetter", "eval", "exec", "getattr", "globals", "modules", "vars"})
"""What finds things by a name in a text."""
_NAME = re.compile(r"[^\W\d]\w*")


def function_parts(function: types.FunctionType, walk: Walk) -> Iterator[str]:
    """Code, defaults, closure, attributes, and what the code names."""
    guards = walk.guards
    yield f"{function.__module__} {code_token(guards.attribute(function, '__code__'))}"
    if is_library(function.__module__):
        yield from _wrapped_parts(function, walk)
        return
    yield walk.token(guards.attribute(function, "__defaults__"))
    yield walk.token(guards.attribute(function, "__kwdefaults__"))
    for cell in function.__closure__ or ():
        yield walk.token(guards.attribute(cell, "cell_contents"))
    attributes = [each for each in guards.state(function) if not each[0].startswith("_torchdynamo")]
    yield from walk.pairs(attributes)
    yield from _named_parts(function, walk)


def _wrapped_parts(function: types.FunctionType, walk: Walk) -> Iterator[str]:
    """What a library's function is wrapped around: the rest is known by the function's name."""
    cells = [walk.guards.attribute(cell, "cell_contents") for cell in function.__closure__ or ()]
    for value in (*cells, walk.guards.slot(function.__dict__, "__wrapped__")):
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            yield walk.token(value)


def _named_parts(function: types.FunctionType, walk: Walk) -> Iterator[str]:
    names, imports, constants = named(function.__code__)
    texts = set(constants)
    if is_foreign(function.__module__):
        if names & _BY_TEXT:
            names = names.union(*map(_NAME.findall, texts))
            imports |= texts
        walk.foreign |= names
        for name in sorted(names & _OF_FILES):
            walk.refuse(f"code that calls {name}()")
    walk.names |= names
    for name in sorted(names):
        value = walk.guards.slot(function.__globals__, name)
        if value is MISSING:
            value = walk.guards.slot(vars(builtins), name)
        if isinstance(value, types.ModuleType):
            yield from _module_parts(value, names, walk)
        elif value is not MISSING:
            _refuse_outside(value, walk)
            yield f"{name} {walk.token(value)}"
            texts |= {value} if isinstance(value, str) else set()
    for name in sorted(imports & sys.modules.keys()):
        yield from _module_parts(sys.modules[name], names, walk)
    if names & {"environ", "getenv"}:
        walk.environment.update(
            (text, os.environ.get(text)) for text in texts if text.isidentifier()
        )


def _module_parts(module: types.ModuleType, names: frozenset[str], walk: Walk) -> Iterator[str]:
    """What code that names a module may take from it and from the modules within it."""
    yield f"module {module.__name__}"
    if module.__name__.partition(".")[0] in _OUTSIDE:
        walk.refuse(f"code that uses {module.__name__}")
    for name in sorted(names & module.__dict__.keys()):
        value = walk.guards.slot(module.__dict__, name)
        if value is sys.modules:  # those that are meant are named in texts
            continue
        if not isinstance(value, types.ModuleType):
            _refuse_outside(value, walk)
            yield f"{name} {walk.token(value)}"
        elif value.__name__.startswith(f"{module.__name__}."):
            yield from _module_parts(value, names, walk)


def _refuse_outside(value: Any, walk: Walk) -> None:
    home = getattr(value, "__module__", None)
    if not callable(value) or not isinstance(home, str):
        return
    reads = getattr(value, "__name__", "") in _READERS and is_library(home)
    if reads or home.partition(".")[0] in _OUTSIDE:
        walk.refuse(f"code that uses {home}.{getattr(value, '__name__', '')}")


class Members:
    """Classes that a walk met. What they have is looked at where reached code names it."""

    def __init__(self) -> None:
        self._names: dict[type, str] = {}
        self._modules: dict[str, types.ModuleType] = {}
        self._registries: dict[str, GeneralInterface] = {}

    def add(self, kind: type) -> str:
        """A class, by name. Libraries' are no more than their name, modules excepted."""
        name = f"{kind.__module__}.{kind.__qualname__}"
        opened = issubclass(kind, (torch.nn.Module, torch.Tensor)) or not is_library(
            kind.__module__
        )
        if opened and not issubclass(kind, GeneralInterface):
            self._names.setdefault(kind, name)
            if type(kind) is not type:
                self.add(type(kind))
        return name

    def add_module(self, module: types.ModuleType, walk: Walk) -> str:
        """A module that is held as a value."""
        if module.__name__.partition(".")[0] in _OUTSIDE:
            walk.refuse(f"code that uses {module.__name__}")
        self._modules.setdefault(module.__name__, module)
        return module.__name__

    def add_registry(self, registry: GeneralInterface) -> str:
        """Functions by name, of which the configs choose."""
        name = self.add(type(registry))
        self._registries.setdefault(name, registry)
        return name

    def parts(self, walk: Walk) -> list[str]:
        """What is named of all these, until nothing new comes of it."""
        done: dict[tuple[str, str], str] = {}
        open_kinds: dict[type, dict[str, Any]] = {}
        while new := self._new(done, open_kinds, walk):
            for key, value in sorted(new.items()):
                done[key] = walk.token(value)
        return [f"{home}.{name} {token}" for (home, name), token in sorted(done.items())]

    def _new(
        self, done: dict[tuple[str, str], str], opened: dict[type, dict[str, Any]], walk: Walk
    ) -> dict[tuple[str, str], Any]:
        for kind in self._names.keys() - opened.keys():
            opened[kind] = _members_of(kind, walk)
        found = dict(self._of_modules(walk))
        for kind, members in opened.items():
            for name in members:
                if name in walk.names or _is_implicit(name, kind):
                    found[self._names[kind], name] = members[name]
        for home, registry in self._registries.items():
            found.update(((home, name), registry[name]) for name in walk.chosen & set(registry))
        return {key: value for key, value in found.items() if key not in done}

    def _of_modules(self, walk: Walk) -> Iterator[tuple[tuple[str, str], Any]]:
        for home, module in list(self._modules.items()):
            for name in walk.names & module.__dict__.keys():
                yield (home, name), walk.guards.slot(module.__dict__, name)


def _members_of(kind: type, walk: Walk) -> dict[str, Any]:
    members: dict[str, Any] = {}
    walk.guards.attribute(kind, "__bases__")
    for base in reversed(kind.__mro__):
        if base not in (object, torch.Tensor.__base__):
            held = walk.guards.class_members(base)
            frame = base is torch.nn.Module or is_frame(base.__module__)
            members.update((k, v) for k, v in held if not frame or k in ENTRIES)
    return members


def _is_implicit(name: str, kind: type) -> bool:
    """Whether Python calls a method without anybody naming it, such as `__add__`."""
    dunder = name.startswith("__") and name.endswith("__")
    return dunder and isinstance(getattr(kind, name, None), (types.FunctionType, types.MethodType))
