"""Code: what of a function's bytecode decides what it computes, and what it names."""

from __future__ import annotations

import dis
import functools
import sys
import types
from typing import Any, NamedTuple

import xxhash

_LIBRARIES = sys.stdlib_module_names | {
    "accelerate", "huggingface_hub", "numpy", "packaging", "pydantic", "regex", "safetensors",
    "scipy", "tokenizers", "torch", "tqdm", "triton", "typing_extensions",
}  # fmt: skip

_FRAME = tuple(
    f"transformers.{name}"
    for name in (
        "configuration_utils",
        "generation",
        "loss",
        "modeling_utils",
        "models.auto",
        "trainer",
        "utils",
    )
)
"""Of Transformers."""


class Named(NamedTuple):
    """What code names."""

    names: frozenset[str]
    """Globals and attributes; the bytecode does not always tell which."""
    imports: frozenset[str]
    texts: frozenset[str]
    """String constants."""


def is_library(module: str | None) -> bool:
    """Whether code of this module is known by its name, with what it names: Python's own,
    torch, what Transformers' modelling code does not live in."""
    return (module or "").partition(".")[0] in _LIBRARIES or is_frame(module)


def is_foreign(module: str | None) -> bool:
    """Whether code is neither a library's nor of Transformers and PEFT."""
    return not is_library(module) and not (module or "").startswith(("transformers.", "peft."))


def homes(function: types.FunctionType) -> tuple[str | None, str | None]:
    """The module that a function says it is from, which a decorator may have copied, and the one
    whose globals it has."""
    return function.__module__, function.__globals__.get("__name__")


def home_of(kind: type) -> str:
    """The module of a class. Some that are made in C have something else under its name."""
    module = kind.__module__
    return module if isinstance(module, str) else "builtins"


def is_frame(module: str | None) -> bool:
    """Whether code loads, drives and trains models rather than computing what they do."""
    return (module or "").startswith(_FRAME)


@functools.lru_cache(maxsize=16384)
def code_token(code: types.CodeType) -> str:
    """The same for the same code in every process. No line numbers, no file names."""
    flags = (code.co_flags, code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    state = xxhash.xxh3_128(code.co_code)
    state.update(repr((flags, names, [_constant(each) for each in code.co_consts])).encode())
    state.update(getattr(code, "co_exceptiontable", b""))
    return state.hexdigest()


def _constant(x: Any) -> str:
    if isinstance(x, types.CodeType):
        return code_token(x)
    if isinstance(x, frozenset):  # its order is the process's own
        return f"frozenset {sorted(map(_constant, x))}"
    if isinstance(x, tuple):
        return f"({', '.join(map(_constant, x))})"
    return f"{type(x).__name__} {x!r}"


@functools.lru_cache(maxsize=16384)
def named(code: types.CodeType) -> Named:
    """All that code names, that of the functions within it included."""
    inner = [named(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    imports = [each.argval for each in dis.get_instructions(code) if each.opname == "IMPORT_NAME"]
    texts = [each for each in code.co_consts if isinstance(each, str)]
    return Named(
        frozenset(code.co_names).union(*(each.names for each in inner)),
        frozenset(imports).union(*(each.imports for each in inner)),
        frozenset(texts).union(*(each.texts for each in inner)),
    )
