"""Components by name: entry points that are imported when somebody names them, and not before."""

from __future__ import annotations

import difflib
import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from lmcache_core.errors import ConfigError, UnknownComponent
from lmcache_core.plugins.blame import cause
from lmcache_core.plugins.secrets import masked

Group = Literal["backends", "serdes", "connectors", "eviction", "plugins"]
_SINGULAR = {
    "backends": "backend",
    "serdes": "serde",
    "connectors": "connector",
    "eviction": "eviction policy",
    "plugins": "plugin",
}


def component(group: Group, name: str) -> Any:
    """The class that `name` stands for, such as ("backends", "disk").

    Raises UnknownComponent, with the known names, for one that no installed package brings, and
    ConfigError where two bring it, or where its import fails, such as for a client library that is
    not installed.
    """
    entry = _entry(group, name)
    try:
        found = entry.load()
    except BaseException as error:  # a plugin's import may raise anything, SystemExit included
        raise ConfigError(_not_importable(group, entry, error)) from error
    if old := _of_before_a_reload(found):
        text = f"{_SINGULAR[group]} {entry.name!r} is of another {old} than is loaded now"
        raise ConfigError(f"{text}: modules were reloaded; restart the process")
    return found


def _of_before_a_reload(component: Any) -> str:
    """One of our classes that a component inherits from and that is no longer the one of its name,
    as after importlib.reload: nothing would take it for what it is."""
    for base in getattr(component, "__mro__", ())[1:]:
        now = getattr(sys.modules.get(base.__module__), base.__qualname__, base)
        if base.__module__.startswith("lmcache_core.") and now is not base:
            return f"{base.__module__}.{base.__qualname__}"
    return ""


def known(group: Group) -> list[str]:
    """Names of the installed components of a group."""
    return sorted(_entries(group))


def described(group: Group, name: str) -> str:
    """A component's name and its distribution's, for people. Raises as `component` does."""
    return f"{name!r} of {_distribution(_entry(group, name))}"


def distributions(group: Group, name: str) -> str:
    """Which distributions bring a component, for people."""
    return " and ".join(sorted(map(_distribution, _entries(group).get(name, ()))))


def _entry(group: Group, name: str) -> EntryPoint:
    entries = _entries(group).get(name, ())
    if len(entries) == 1:
        return entries[0]
    if not entries:
        raise UnknownComponent(_unknown(group, name))
    # Which one is meant nobody can say, and one that takes another's name may be no accident.
    owners = " and ".join(sorted(map(_distribution, entries)))
    raise ConfigError(f"{_SINGULAR[group]} {name!r} is brought by {owners}; uninstall all but one")


@lru_cache(maxsize=8)
def _entries(group: Group) -> dict[str, list[EntryPoint]]:
    entries: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=f"lmcache_core.{group}"):
        entries.setdefault(entry.name, []).append(entry)
    return entries


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def _unknown(group: Group, name: str) -> str:
    names = known(group)
    close = difflib.get_close_matches(name, names, 1, cutoff=0.5)
    hint = f", did you mean {close[0]!r}?" if close else "."
    known_ones = ", ".join(names) or "none"
    return f"unknown {_SINGULAR[group]} {masked(repr(name))}{hint} Known: {known_ones}"


def _not_importable(group: Group, entry: EntryPoint, error: BaseException) -> str:
    text = f"{_SINGULAR[group]} {entry.name!r} of {_distribution(entry)} cannot be imported: "
    text += cause(error)
    if isinstance(error, ModuleNotFoundError) and entry.extras:
        package = entry.dist.name if entry.dist else "lmcache-core"
        text += f"; install {package}[{','.join(entry.extras)}]"
    return text


def reloaded(cls: Any, base: type) -> str:
    """Says so of a class that derives from what `base` was before its module was reloaded; ""
    of any other."""
    full = (base.__module__, base.__qualname__)
    bases = cls.mro() if isinstance(cls, type) else []
    if base not in bases and full in ((each.__module__, each.__qualname__) for each in bases):
        return "is older than lmcache_core, which was reloaded: restart the process"
    return ""
