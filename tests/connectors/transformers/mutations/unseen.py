"""What no means can see: values from outside Python's objects.

Not in the table, and documented (docs/identity.md). That they are true is tested, so that the
list says what is.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.connectors.transformers.mutations.state import reads

UNSEEN: list[Callable[[Any], Iterator[Any]]] = []


def _unseen(change: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
    UNSEEN.append(change)
    return change


@_unseen
def a_file(model: Any) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "factor"
        path.write_text("1")
        reads(model, lambda: float(path.read_text()))
        yield
        path.write_text("2")
        yield


@_unseen
def a_pipe(model: Any) -> Iterator[Any]:
    """As from another process or the network: it says a number, and is asked again."""
    read, write = os.pipe()
    last = [1.0]

    def ask() -> float:
        os.set_blocking(read, False)
        with contextlib.suppress(BlockingIOError):
            last[0] = float(os.read(read, 10))
        return last[0]

    reads(model, ask)
    yield
    os.write(write, b"2")
    yield
    os.close(read)
    os.close(write)


@_unseen
def a_number_of_the_process(model: Any) -> Iterator[Any]:
    """A function of torch that tells what C++ keeps."""
    reads(model, lambda: float(torch.get_num_threads()))
    yield
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)
