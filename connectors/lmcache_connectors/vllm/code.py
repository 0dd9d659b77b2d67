"""The code of a model in a worker: its classes' source files, and the functions in them.

Files count by content and not by name. vLLM's stand for themselves, Transformers' too, which it may
take models from: their versions say the rest. Of any other package, such as the files that a model
brings along, all that these files import of it belongs to them, whether it is loaded yet or not.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from lmcache_core.errors import NoContent

_LIBRARIES = frozenset(("torch", *sys.stdlib_module_names)) - {"__main__"}
"""Packages whose code decides only how results are rounded."""
_VERSIONED = ("vllm", "transformers")
"""Packages that are known by their versions, besides the files of classes."""
_PLAIN = (type(None), bool, int, float, str)


def code_digests(models: Iterable[torch.nn.Module]) -> dict[str, bytes]:
    """16 bytes for each file and each function of a class. Raises NoContent where there is no file
    to read."""
    kinds = {kind for model in models for part in model.modules() for kind in type(part).__mro__}
    kinds = {kind for kind in kinds if not _is_library(kind.__module__)}
    kinds = {kind for kind in kinds if not kind.__module__.startswith("vllm.lora.")}  # see the walk
    digests: dict[str, bytes] = {}
    for kind in kinds:
        for file in _files(kind.__module__, sys.modules.get(kind.__module__)):
            digests[f"code {file.hex()}"] = file
        for key, value in vars(kind).items():
            if known := function_digest(value):
                digests[f"code {kind.__qualname__}.{key} {known.hex()}"] = known
    if any(kind.__module__.startswith("transformers.") for kind in kinds):
        digests["transformers"] = version("transformers").encode()  # vLLM's is known elsewhere
    return digests


def function_digest(value: Any) -> bytes:
    """16 bytes for a function or a method: of its file, its name there and the plain values that it
    has at hand, and of the function that it wraps; nothing for anything else. Raises NoContent."""
    if isinstance(value, MethodType | staticmethod | classmethod):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    said = []
    while isinstance(value, FunctionType):
        module = value.__globals__.get("__name__", "")
        files = _files(module, sys.modules.get(module)) if not _is_library(module) else ()
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
        plain = [each for each in (*(value.__defaults__ or ()), *cells) if type(each) in _PLAIN]
        said.append(f"{value.__code__.co_qualname} {sorted(map(bytes.hex, files))} {plain}")
        value = getattr(value, "__wrapped__", None)
    return _digest("\n".join(said).encode()) if said else b""


def _is_full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


@lru_cache(maxsize=4096)
def _files(name: str, module: ModuleType | None) -> frozenset[bytes]:
    """Digests of the file that a module was loaded from, and of those that belong to it."""
    file = getattr(module, "__file__", None)
    if file is None:
        raise NoContent(f"code that came from no file ({name})")
    top, *inner = name.split(".")
    if top in _VERSIONED:
        return frozenset([_digest(Path(file).read_bytes())])
    place = Path(file).parent if Path(file).name == "__init__.py" else Path(file)
    root = place.parents[len(inner) - 1] if inner else place
    return frozenset(map(_digest, _with_imports(Path(file), root)))


def _with_imports(file: Path, root: Path) -> list[bytes]:
    """What stands in a file, and in all that it imports of the package at `root`."""
    found: dict[Path, bytes] = {}
    todo = [file]
    while todo:
        file = todo.pop()
        if file not in found and file.is_file():
            found[file] = file.read_bytes()
            todo += [each for each in _imports(file, root) if each.is_relative_to(root)]
    return list(found.values())


def _imports(file: Path, root: Path) -> Iterator[Path]:
    """Where what a file imports may lie, if it is of the package at `root`; a file's own package
    is imported before it."""
    yield file.parent / "__init__.py"
    tree = ast.Module([], [])
    with contextlib.suppress(SyntaxError, ValueError):  # of another Python, or compiled
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each for name in node.names for each in _places(root.parent, name.name))
        elif isinstance(node, ast.ImportFrom):
            base = file.parents[node.level - 1] if node.level else root.parent
            module = f"{node.module}." if node.module else ""
            yield from _places(base, module.rstrip("."))
            names = [module + name.name for name in node.names]
            yield from (each for name in names for each in _places(base, name))


def _places(base: Path, name: str) -> list[Path]:
    """The files that a dotted name may stand for below a directory."""
    place = base.joinpath(*name.split("."))
    return [place.with_name(f"{place.name}.py"), place / "__init__.py"]


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()
