"""Components by name: entry points that are imported when somebody names them, and not before."""

from __future__ import annotations

import difflib
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from lmcache_core.errors import ConfigError, UnknownComponent

Group = Literal["backends", "serdes", "connectors", "eviction"]
_SINGULAR = {
    "backends": "backend",
    "serdes": "serde",
    "connectors": "connector",
    "eviction": "eviction policy",
}


def component(group: Group, name: str) -> Any:
    """The class that `name` stands for, such as ("backends", "disk").

    Raises UnknownComponent, with the known names, for one that no installed package brings, and
    ConfigError where its import fails, such as for a client library that is not installed.
    """
    entry = _entries(group).get(name)
    if entry is None:
        raise UnknownComponent(_unknown(group, name))
    try:
        return entry.load()
    except Exception as error:  # a plugin's import may raise anything
        raise ConfigError(_not_importable(group, entry, error)) from error


def known(group: Group) -> list[str]:
    """Names of the installed components of a group."""
    return sorted(_entries(group))


@lru_cache(maxsize=8)
def _entries(group: Group) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=f"lmcache_core.{group}")}


def _unknown(group: Group, name: str) -> str:
    names = known(group)
    close = difflib.get_close_matches(name, names, 1, cutoff=0.5)
    hint = f", did you mean {close[0]!r}?" if close else "."
    return f"unknown {_SINGULAR[group]} {name!r}{hint} Known: {', '.join(names) or 'none'}"


def _not_importable(group: Group, entry: EntryPoint, error: Exception) -> str:
    text = f"{_SINGULAR[group]} {entry.name!r} cannot be imported: {error}"
    if isinstance(error, ModuleNotFoundError) and entry.extras:
        package = entry.dist.name if entry.dist else "lmcache-core"
        text += f"; install {package}[{','.join(entry.extras)}]"
    return text
