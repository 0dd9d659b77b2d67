"""The files that a model's code consists of. Needs no vLLM."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmcache_connectors.vllm.code import code_digests, function_digest
from lmcache_core.errors import NoContent

FILES = {
    "__init__.py": "# all of it",
    "kinds/__init__.py": "KIND = 1",
    "layers/__init__.py": "# layers",
    "layers/norms.py": "def norm(x):\n    import toys.numbers as given",
    "models/__init__.py": "# models",
    "models/toy.py": "import torch\nfrom ..layers import norms\nclass Toy(torch.nn.Module): pass",
    "numbers.py": "from .kinds import *",
    "tokens.py": "import nothing_that_is_there",
}
"""A package whose class stands in models/toy.py; nobody imports tokens.py."""
Model = Callable[..., torch.nn.Module]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model of that package, with some of its files others."""
    folders = itertools.count()

    def build(package: str = "toys", **others: str) -> torch.nn.Module:
        root = tmp_path / str(next(folders))
        for name, text in (FILES | others).items():
            file = root / package / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(str(root))
        return importlib.import_module(f"{package}.models.toy").Toy()

    return build


def test_all_that_it_imports_of_its_package_is_part_of_it(model: Model) -> None:
    first = code_digests([model()])
    assert len(first) == len(FILES) - 1
    for name, text in FILES.items():
        changed = code_digests([model(**{name: f"{text}\n"})])
        assert (changed != first) == (name != "tokens.py"), name
    assert code_digests([model()]) == first


def test_what_it_is_called_is_not(model: Model) -> None:
    relative = {"layers/norms.py": "from ..numbers import KIND"}
    assert code_digests([model("one", **relative)]) == code_digests([model("two", **relative)])


def test_code_without_a_file_is_refused() -> None:
    class Typed(torch.nn.Module):
        """As from a notebook's cell."""

    Typed.__module__ = "a_module_that_is_not_there"
    with pytest.raises(NoContent, match="a_module_that_is_not_there"):
        code_digests([Typed()])


def one(self: object, by: int = 1) -> int:
    return by


def another(self: object, by: int = 1) -> int:
    return by


def bound(by: int) -> Callable[..., int]:
    def inner(self: object) -> int:
        return by

    return inner


@pytest.mark.parametrize("wrapped", [staticmethod, classmethod, property])
def test_a_function_is_known_by_its_name_and_what_it_has_at_hand(wrapped: Callable) -> None:
    functions = [one, another, bound(1), bound(2)]
    assert len({function_digest(each) for each in functions}) == 4
    assert function_digest(bound(1)) == function_digest(bound(1))
    assert function_digest(wrapped(another)) != function_digest(wrapped(bound(1)))


class Strange:
    """What some library may hang on a module."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)


def test_anything_else_is_no_function() -> None:
    for value in (3, "text", torch.zeros(2), functools.partial(one), Strange()):
        assert function_digest(value) == b""
