"""Problems: all that is wrong with a config, each with its place, in words that help."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lmcache_core.config.positions import KeyPath
from lmcache_core.errors import ConfigError
from lmcache_core.plugins.secrets import masked, shown, shown_key
from lmcache_core.plugins.units import WRITTEN

M = TypeVar("M", bound=BaseModel)
_ENVIRONMENT = "environment: "


def in_environment(variable: str) -> str:
    """The place of what a variable says."""
    return _ENVIRONMENT + variable


class Problems:
    """Collects what is wrong; raises all of it, as one ConfigError, at the end of a `with`."""

    def __init__(self, places: Mapping[KeyPath, str]) -> None:
        """`places`: where each key path was set; empty for what Python built."""
        self.places = dict(places)
        self._found: list[tuple[int, str]] = []
        """Lines of the file, and what is wrong there."""

    def __repr__(self) -> str:
        return f"Problems({[text for _, text in self._found]})"

    def __bool__(self) -> bool:
        return bool(self._found)

    def where(self, path: KeyPath) -> str:
        """Such as "cache.yaml:7: tiers[1].capacity"."""
        known = [path[:n] for n in range(len(path), -1, -1) if path[:n] in self.places]
        place = self.places[known[0]] if known else ""
        if place.startswith(_ENVIRONMENT) and len(path) == 1:
            return place  # the variable's name is the key
        return ": ".join(filter(None, [place, _text(path)]))

    def add(self, path: KeyPath, problem: str) -> None:
        """Note what is wrong at a key path."""
        where = self.where(path)
        line = where.split(": ")[0].rpartition(":")[2]
        text = f"{where}: {problem}" if where else problem
        self._found.append((int(line) if line.isdecimal() else 0, text))

    def check(
        self, model: type[M], data: Mapping[str, Any], path: KeyPath, known: Sequence[str] = ()
    ) -> M | None:
        """`data` as `model`; None, with the problems noted, where it does not fit.

        `known`: all keys that could have been meant at this place, the model's own if not given.
        """
        try:
            return model.model_validate(dict(data), context={WRITTEN: bool(self.places)})
        except ValidationError as error:
            for details in error.errors(include_url=False):
                loc = tuple(step for step in details["loc"] if isinstance(step, str | int))
                names = _fields_at(model, loc[:-1]) if loc[1:] else known or [*model.model_fields]
                self.add((*path, *loc), _explain(details, names))
        except Exception as error:  # a plugin's validator may raise anything
            self.add(path, f"cannot be checked: {type(error).__name__}: {masked(str(error))}")
        return None

    def mapping(self, data: Any, path: KeyPath) -> dict[str, Any] | None:
        """`data` as keys and values; None, with the problem noted, where it is something else."""
        if isinstance(data, Mapping) and all(isinstance(key, str) for key in data):
            return dict(data)
        self.add(path, f"expected keys and values; found {shown(data)}")
        return None

    def __enter__(self) -> Problems:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._found:
            in_order = sorted(self._found, key=lambda found: found[0])
            raise ConfigError("\n".join(text for _, text in in_order))


def closest(name: str, names: Sequence[str]) -> str:
    """A question for the name that was meant, or "." where none is close."""
    close = difflib.get_close_matches(name, names, 1)
    return f", did you mean {close[0]!r}?" if close else "."


def _text(path: KeyPath) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{shown_key(step)}" for step in path)
    return "".join(steps).removeprefix(".")


def _fields_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys of the model that a field of a model is, or a field of that, and so on."""
    for step in path:
        field = model.model_fields.get(str(step))
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        model = kind
    return list(model.model_fields)


def _explain(details: Any, known: Sequence[str]) -> str:
    """What pydantic found, in words that help; never a secret."""
    key = str(details["loc"][-1]) if details["loc"] else ""
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{closest(key, known)} Known: {', '.join(sorted(set(known)))}"
    if kind == "missing":
        return "required, but not there"
    if kind == "value_error":
        expected = masked(str(context["error"]))
    else:
        expected = str(details["msg"]).replace("Input should be", "expected")
    return f"{expected[:1].lower()}{expected[1:]}; found {shown(details['input'], key)}"
