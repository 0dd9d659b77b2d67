"""What code reaches by name: globals, modules, members of classes, the environment."""

from __future__ import annotations

import builtins
import functools
import operator
import os
import re
import sys
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils.generic import GeneralInterface

from lmcache_connectors.transformers.code import (
    code_token,
    home_of,
    homes,
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
_COMPILES = "torch.utils.cpp_extension"
"""Its `load` gives code in C++, which is known by its name."""
_OF_FILES = frozenset(
    {
        "exists", "is_dir", "is_file", "iterdir", "read_bytes", "read_text", "readinto",
        "readline", "readlines", "recv"
    }
)  # fmt: skip
"""Methods of paths, files and sockets."""
_BY_TEXT = frozenset({"attrgetter", "eval", "exec", "getattr", "globals", "modules", "vars"})
"""What finds things by a name in a text."""
_DATA = (
    bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset, torch.Tensor,
    np.ndarray,
)  # fmt: skip
"""What somebody may keep on a class and find by a name that is put together."""
_NAME = re.compile(r"[^\W\d]\w*")


def function_parts(function: types.FunctionType, walk: Walk) -> Iterator[str]:
    """Code, defaults, closure, attributes, and what the code names."""
    guards = walk.guards
    yield f"{function.__module__} {code_token(guards.attribute(function, '__code__'))}"
    said, real = homes(function)
    if is_library(real):
        yield from _put_in_parts(function, walk)
    if is_library(said) and is_library(real):
        yield from _wrapped_parts(function, walk)
        return
    yield walk.token(guards.attribute(function, "__defaults__"))
    yield walk.token(guards.attribute(function, "__kwdefaults__"))
    for cell in function.__closure__ or ():
        yield walk.token(guards.attribute(cell, "cell_contents"))
    attributes = [each for each in guards.state(function) if not each[0].startswith("_torchdynamo")]
    yield from walk.pairs(attributes)
    if not is_library(real):
        yield from _named_parts(function, walk)


def _wrapped_parts(function: types.FunctionType, walk: Walk) -> Iterator[str]:
    """What a library's function is wrapped around: the rest is known by the function's name."""
    cells = [walk.guards.attribute(cell, "cell_contents") for cell in function.__closure__ or ()]
    for value in (*cells, walk.guards.slot(function.__dict__, "__wrapped__")):
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            yield walk.token(value)


def _put_in_parts(function: types.FunctionType, walk: Walk) -> Iterator[str]:
    """Functions that somebody put in place of what a library's code names; torch.nn's own are
    followed, for most of it only calls others."""
    names = named(function.__code__).names
    for name in sorted(names):
        value = walk.guards.slot(function.__globals__, name)
        for found in _functions(value, names, walk):
            said, real = homes(found)
            followed = (real or "").startswith("torch.nn.")
            if followed or not (is_library(said) and is_library(real)):
                yield f"{name} {walk.token(found)}"


def _functions(value: Any, names: frozenset[str], walk: Walk) -> Iterator[types.FunctionType]:
    """A function, or those of a module and of the modules within it that go by these names."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, types.ModuleType):
        for name in sorted(names & value.__dict__.keys()):
            inner = walk.guards.slot(value.__dict__, name)
            within = getattr(inner, "__name__", "").startswith(f"{value.__name__}.")
            if within or not isinstance(inner, types.ModuleType):
                yield from _functions(inner, names, walk)


def _named_parts(function: types.FunctionType, walk: Walk) -> Iterator[str]:
    names, imports, constants = named(function.__code__)
    texts = set(constants)
    if any(map(is_foreign, homes(function))):
        if names & _BY_TEXT:
            walk.by_text = True
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
    module = getattr(value, "__module__", None)
    if not callable(value) or not isinstance(module, str):
        return
    name = getattr(value, "__name__", "")
    reads = module != _COMPILES and name in _READERS and is_library(module)
    if reads or module.partition(".")[0] in _OUTSIDE:
        walk.refuse(f"code that uses {module}.{name}")


class Members:
    """Classes that a walk met, with their bases: what they have is looked at where reached code
    names it. Bases one by one, for `super()` reaches what a derived class hides."""

    def __init__(self) -> None:
        self._names: dict[type, str] = {}
        self._alike: dict[str, int] = {}
        self._modules: dict[str, types.ModuleType] = {}
        self._registries: dict[str, GeneralInterface] = {}

    def add(self, kind: type) -> str:
        """A class, by name."""
        if kind not in self._names:
            for each in kind.__mro__:
                self._open(each)
            if type(kind) is not type:
                self.add(type(kind))
        return self._names.get(kind) or _name(kind)

    def _open(self, kind: type) -> None:
        """Classes of one name, such as a function makes, are told apart by who comes first."""
        if kind in self._names or kind in (object, type, torch.Tensor.__base__):
            return
        name = _name(kind)
        number = self._alike[name] = self._alike.get(name, 0) + 1
        self._names[kind] = name if number == 1 else f"{name} {number}"

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
        opened: dict[type, dict[str, Any]] = {}
        while new := self._new(done, opened, walk):
            for key, value in sorted(new.items(), key=operator.itemgetter(0)):
                done[key] = walk.token(value)
        return [f"{home}.{name} {token}" for (home, name), token in sorted(done.items())]

    def _new(
        self, done: dict[tuple[str, str], str], opened: dict[type, dict[str, Any]], walk: Walk
    ) -> dict[tuple[str, str], Any]:
        for kind in self._names:
            if kind not in opened:
                opened[kind] = _members_of(kind, walk)
        found = dict(self._of_modules(walk))
        for kind, members in opened.items():
            found.update(
                ((self._names[kind], name), value)
                for name, value in members.items()
                if name in walk.names
                or _is_implicit(name, value)
                or _is_found(name, value, kind, walk)
            )
        for home, registry in self._registries.items():
            found.update(((home, name), registry[name]) for name in walk.chosen & set(registry))
        return {key: value for key, value in found.items() if key not in done}

    def _of_modules(self, walk: Walk) -> Iterator[tuple[tuple[str, str], Any]]:
        for home, module in list(self._modules.items()):
            for name in walk.names & module.__dict__.keys():
                yield (home, name), walk.guards.slot(module.__dict__, name)


def _name(kind: type) -> str:
    return f"{home_of(kind)}.{kind.__qualname__}"


def _members_of(kind: type, walk: Walk) -> dict[str, Any]:
    """What a class itself has, and its bases in their order."""
    members = dict(walk.guards.class_members(kind))
    if _is_known_by_name(kind):
        members = {k: v for k, v in members.items() if k in ENTRIES or not _is_of_library(v)}
    if issubclass(kind, GeneralInterface):  # the configs tell which of these
        members.pop("_global_mapping", None)
    walk.guards.attribute(kind, "__bases__")
    return {**members, "__mro__": [*map(_name, kind.__mro__)]}


def _is_known_by_name(kind: type) -> bool:
    """Whether a class's code is a library's, but for what somebody put into it."""
    if kind is torch.nn.Module or is_frame(home_of(kind)):
        return True
    return is_library(home_of(kind)) and not issubclass(kind, (torch.nn.Module, torch.Tensor))


def _is_of_library(member: Any) -> bool:
    """Whether this is code of a library."""
    function = getattr(member, "fget", None) or getattr(member, "__func__", member)
    if isinstance(function, types.FunctionType):
        return all(map(is_library, homes(function)))
    module = getattr(function, "__module__", None)
    return hasattr(function, "__qualname__") and (module is None or is_library(module))


def _is_found(name: str, value: Any, kind: type, walk: Walk) -> bool:
    """Whether code may find this by a name that it puts together."""
    data = isinstance(value, _DATA) and not name.startswith("__")
    return data and walk.by_text and is_foreign(home_of(kind))


def _is_implicit(name: str, value: Any) -> bool:
    """Whether Python uses a member without anybody naming it, such as `__add__`."""
    dunder = name.startswith("__") and name.endswith("__")
    return name == "__mro__" or (dunder and (callable(value) or hasattr(value, "__get__")))
