"""Guards: what a walk met, so that the next one can be spared while all of it is still there."""

from __future__ import annotations

import contextvars
import itertools
import operator
from collections.abc import Iterable, Mapping
from typing import Any

MISSING: Any = object()
"""In place of a value that is not there."""


class Guards:
    """References to all that a walk met, and whether the same objects are still in their places.

    Places are compared by identity. What is referred to here is not freed, so that no other object
    can have its number. Each method notes a place and returns what is there, as it is compared.
    """

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._classes: list[type] = []
        self._members: dict[type, list[tuple[str, Any]]] = {}
        self._mappings: list[dict[Any, Any]] = []
        self._proxies: list[tuple[Mapping[Any, Any], list[tuple[Any, Any]]]] = []
        self._keys: list[Any] = []
        self._mapped: list[Any] = []
        self._iterables: list[Any] = []
        self._items: list[Any] = []
        self._lengths: list[int] = []
        self._slots: dict[tuple[int, str], tuple[Mapping[str, Any], str, Any]] = {}
        self._attributes: list[tuple[Any, str, Any]] = []
        self._variables: list[tuple[contextvars.ContextVar[Any], Any]] = []
        self._dicts: list[tuple[Any, Any]] = []

    def __repr__(self) -> str:
        return f"Guards({len(self._mapped)} values of {len(self._mappings)} mappings)"

    def state(self, x: Any) -> list[tuple[Any, Any]]:
        """An object's class and `__dict__`."""
        self._objects.append(x)
        self._classes.append(type(x))
        held = getattr(x, "__dict__", None)
        if held is None:
            return []
        self._dicts.append((x, held))
        return self.mapping(held)

    def mapping(self, x: dict[Any, Any]) -> list[tuple[Any, Any]]:
        """Keys and values that a dict really has, whatever methods its class has."""
        items = list(dict.items(x))
        self._mappings.append(x)
        self._keys += [key for key, _ in items]
        self._mapped += [value for _, value in items]
        self._lengths.append(len(items))
        return items

    def proxy(self, x: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
        """Keys and values behind a mapping that is no dict, such as a class's."""
        items = list(x.items())
        self._proxies.append((x, items))
        return items

    def class_members(self, kind: type) -> list[tuple[str, Any]]:
        """What a class itself has; noted once."""
        if kind not in self._members:
            self._members[kind] = self.proxy(kind.__dict__)
        return self._members[kind]

    def items(self, x: Iterable[Any]) -> list[Any]:
        """Items of a list, a set, a deque ..."""
        items = list(x)
        self._iterables.append(x)
        self._items += [*items, MISSING]
        return items

    def slot(self, x: Mapping[str, Any], name: str) -> Any:
        """One value of a mapping, such as a global, or MISSING."""
        value = x.get(name, MISSING)
        self._slots.setdefault((id(x), name), (x, name, value))
        return value

    def attribute(self, x: Any, name: str) -> Any:
        """An attribute that is in no `__dict__`, or MISSING."""
        value = _attribute(x, name)
        self._attributes.append((x, name, value))
        return value

    def variable(self, x: contextvars.ContextVar[Any]) -> Any:
        """A context variable's value here, or MISSING."""
        value = x.get(MISSING)
        self._variables.append((x, value))
        return value

    def hold(self) -> bool:
        """Whether every place has what it had."""
        try:
            return self._objects_hold() and self._containers_hold() and self._places_hold()
        except RuntimeError:  # something was changed by another thread meanwhile
            return False

    def _objects_hold(self) -> bool:
        return _same(map(type, self._objects), self._classes) and all(
            x.__dict__ is held for x, held in self._dicts
        )

    def _containers_hold(self) -> bool:
        chained = itertools.chain.from_iterable
        return (
            list(map(dict.__len__, self._mappings)) == self._lengths
            and _same(chained(map(dict.__iter__, self._mappings)), self._keys)
            and _same(chained(map(dict.values, self._mappings)), self._mapped)
            and all(_same_pairs(x, items) for x, items in self._proxies)
            and _same(chained((*x, MISSING) for x in self._iterables), self._items)
        )

    def _places_hold(self) -> bool:
        return (
            all(x.get(name, MISSING) is value for x, name, value in self._slots.values())
            and all(_attribute(x, name) is value for x, name, value in self._attributes)
            and all(x.get(MISSING) is value for x, value in self._variables)
        )


def _same(found: Iterable[Any], held: list[Any]) -> bool:
    """Whether these are the same objects; a marker behind them shows where there are more."""
    both = itertools.zip_longest(found, held, fillvalue=MISSING)
    return all(itertools.starmap(operator.is_, both))


def _same_pairs(found: Mapping[Any, Any], held: list[tuple[Any, Any]]) -> bool:
    if len(found) != len(held):
        return False
    return all(found.get(key, MISSING) is value for key, value in held)


def _attribute(x: Any, name: str) -> Any:
    try:
        return getattr(x, name)
    except (AttributeError, ValueError):  # an empty cell raises ValueError
        return MISSING
