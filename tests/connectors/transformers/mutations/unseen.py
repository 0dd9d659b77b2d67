"""What no means can see: values from outside Python's objects.

Not in the table, and documented (docs/identity.md). That they are true is tested, so that the
list says what is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.connectors.transformers.mutations import output
from tests.connectors.transformers.mutations.state import reads

UNSEEN: list[Callable[[Any], Iterator[Any]]] = []


def _unseen(change: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
    UNSEEN.append(change)
    return change


@_unseen
def a_number_of_the_process(model: Any) -> Iterator[Any]:
    """A function of torch that tells what C++ keeps."""
    reads(model, lambda: float(torch.get_num_threads()))
    yield
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


@_unseen
def an_operator_of_ones_own(model: Any) -> Iterator[Any]:
    """Its kernel is exchanged where torch keeps them, in C++."""
    library = torch.library.Library("lmcache_test", "FRAGMENT")
    library.define("scaled(Tensor x) -> Tensor")
    library.impl("scaled", lambda x: x * 1.0, "CPU")

    class Operated(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.lmcache_test.scaled(super().forward(x))

    output(model).__class__ = Operated
    yield
    library.impl("scaled", lambda x: x * 2.0, "CPU", allow_override=True)
    yield
    library._destroy()
