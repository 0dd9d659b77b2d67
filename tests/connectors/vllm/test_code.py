"""The files that a model's code consists of. Needs no vLLM."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmcache_connectors.vllm.code import code_digests
from lmcache_core import NoContent

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
