"""Ways of changing what a model computes, each a row of `TABLE`.

A row is a function of the model. One without `yield` changes it. One with `yield` prepares the
model first and yields what is asked (None: the model itself); what follows is the change; a second
`yield` is where the changed model is asked, and what comes after that undoes what reached beyond
the model.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

from tests.connectors.transformers.tiny import DTYPES, FAMILIES

Change = Callable[[Any], Iterator[Any] | None]


class Mutation(NamedTuple):
    """A way of changing what a model computes."""

    name: str
    change: Change
    families: tuple[str, ...]
    dtypes: tuple[str, ...]
    alters: bool | None
    """Whether KV of the prompt changes, bit for bit. None: that depends on the model."""
    refused: bool
    """Whether the model may be refused before it changes."""
    soak: bool
    """Only where all is tried: others of the kind stand for it."""

    def run(self, model: Any) -> Iterator[Any]:
        """First what is asked, then the changed model."""
        if not inspect.isgeneratorfunction(inspect.unwrap(self.change)):
            yield model
            self.change(model)
            yield model
            return
        steps = self.change(model)
        asked = next(steps)
        yield model if asked is None else asked
        changed = next(steps, None)
        yield next(x for x in (changed, asked, model) if x is not None)
        next(steps, None)


TABLE: list[Mutation] = []


def mutation(
    *families: str,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    alters: bool | None = True,
    refused: bool = False,
    soak: bool = False,
) -> Callable[[Change], Change]:
    """Put a function into the table; without families it fits all."""

    def put(change: Change) -> Change:
        add(
            change.__name__,
            change,
            *families,
            dtypes=dtypes,
            alters=alters,
            refused=refused,
            soak=soak,
        )
        return change

    return put


def add(
    name: str,
    change: Change,
    *families: str,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    alters: bool | None = True,
    refused: bool = False,
    soak: bool = False,
) -> None:
    """Put a function into the table under a name."""
    assert all(row.name != name for row in TABLE), name
    fits = families or tuple(FAMILIES)
    TABLE.append(Mutation(name, change, fits, dtypes, alters, refused, soak))


# Where every one of the four has something


def first(model: Any) -> Any:
    """The first layer: what it computes is in the KV of those behind it."""
    return model.get_decoder().layers[0]


def output(model: Any) -> Any:
    """A large projection of the first layer."""
    return first(model).self_attn.o_proj


def values(model: Any) -> Any:
    """The projection that KV of the first layer comes from."""
    attention = first(model).self_attn
    return attention.kv_a_proj_with_mqa if hasattr(attention, "kv_lora_rank") else attention.v_proj


def _rows() -> None:
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


_rows()
