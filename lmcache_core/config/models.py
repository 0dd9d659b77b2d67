"""Models: what a config is once it is checked. However it was written, it ends in these.

chunk_size: 256
tiers:                        # fastest first
  - backend: local_cpu
    capacity: 8GiB            # a backend's own keys stand beside the tier's
  - backend: disk
    path: /var/cache/lmcache
    capacity: 200GiB
    serde: [zstd]             # or {zstd: {level: 3}}
    deadline: 200ms
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    model_validator,
)

from lmcache_core.backend import StorageBackend
from lmcache_core.config.positions import KeyPath
from lmcache_core.config.problems import Problems
from lmcache_core.errors import ConfigError
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.plugins.options import Options
from lmcache_core.plugins.registry import component, reloaded
from lmcache_core.plugins.secrets import masked, shown
from lmcache_core.plugins.units import Duration, Size
from lmcache_core.serde import Serde

_NAME = re.compile(r"[\w.-]{1,64}")
_BASES: dict[str, type[Any]] = {"backends": StorageBackend, "serdes": Serde}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class SerdeConfig(_Model):
    """One step of a tier's pipeline."""

    name: str
    options: SerializeAsAny[Options]

    def create(self) -> Serde:
        """The serde itself."""
        serde: Serde = component("serdes", self.name)(self.options)
        return serde


class TierConfig(_Model):
    """One tier.

    name: how logs and metrics call it; the backend's name unless given.
    deadline: seconds that a call may take before it counts as failed.
    queue: bytes that may wait to be written to a slow tier.
    when_full: what happens to a chunk when they do: "drop" it, or "block" the storing thread.
    options: the backend's own keys. In YAML, and when constructing, they stand beside the others.
    """

    name: str = ""
    backend: str
    serde: tuple[SerdeConfig, ...] = ()
    deadline: Duration = 1.0
    queue: Size = 1 << 30
    when_full: Literal["drop", "block"] = "drop"
    options: SerializeAsAny[Options]
    where: str = Field(default="tier", repr=False)
    """Where it was configured, for messages."""

    @property
    def backend_class(self) -> type[StorageBackend]:
        """What the name of the backend stands for."""
        found: type[StorageBackend] = component("backends", self.backend)
        return found

    @model_validator(mode="before")
    @classmethod
    def _by_hand(cls, data: Any, info: ValidationInfo) -> Any:
        if info.context is not None or not isinstance(data, Mapping) or _has_options(data):
            return data
        with Problems({}) as problems:
            built = tier(data, (), problems)
        return _set_fields(built)


class Config(_Model):
    """All tiers, the fastest first.

    chunk_size: tokens in a chunk.
    strict: what makes reuse impossible, such as a store that does not answer, is an error at start
        rather than a log line.
    load: "when_faster" than computing, where the engine tells how fast it computes, or "always".
    """

    chunk_size: int = Field(default=256, ge=1, le=1 << 20, strict=True)
    strict: bool = Field(default=False, strict=True)
    load: Literal["when_faster", "always"] = "when_faster"
    tiers: tuple[TierConfig, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _by_hand(cls, data: Any, info: ValidationInfo) -> Any:
        if info.context is not None or not isinstance(data, Mapping):
            return data
        with Problems({}) as problems:
            built = config(data, problems)
        return _set_fields(built)


_TIER_KEYS = [key for key in TierConfig.model_fields if key not in ("options", "where")]
_NO_OPTIONS = Options()
_NO_TIER = TierConfig.model_construct(backend="", options=_NO_OPTIONS)
"""In place of what is wrong, so that all else is checked, too."""


def config(data: Any, problems: Problems) -> Config | None:
    """A Config from plain data; None, with the problems noted, where something is wrong."""
    data = problems.mapping(data, ())
    if data is None:
        return None
    if "tiers" in data:
        built = [tier(each, path, problems) for path, each in _entries(data["tiers"], problems)]
        tiers = _named_apart([each or _NO_TIER for each in built] or [_NO_TIER])
        _refuse_shared_stores(tiers, problems)
        data["tiers"] = tuple(tiers)
    return problems.check(Config, data, ())


def _entries(data: Any, problems: Problems) -> list[tuple[KeyPath, Any]]:
    if isinstance(data, list | tuple) and data:
        return [(("tiers", index), entry) for index, entry in enumerate(data)]
    problems.add(("tiers",), f"expected a list of tiers, at least one; found {shown(data)}")
    return []


def tier(data: Any, path: KeyPath, problems: Problems) -> TierConfig | None:
    """A TierConfig from plain data; None, with the problems noted, where something is wrong."""
    if isinstance(data, TierConfig):
        return data
    data = problems.mapping(data, path)
    if data is None:
        return None
    own = {key: value for key, value in data.items() if key in _TIER_KEYS}
    rest = {key: value for key, value in data.items() if key not in own}
    backend = own.get("backend")
    options = _options("backends", backend, rest, path, problems)
    serde = _pipeline(own.get("serde", ()), (*path, "serde"), problems)
    named = {} if own.get("name") or not isinstance(backend, str) else {"name": backend}
    where = problems.where(path) or "tier"
    built = {"serde": serde or (), "options": options or _NO_OPTIONS, "where": where}
    checked = problems.check(TierConfig, own | named | built, path)
    return None if options is None or serde is None else checked


def _options(
    group: Literal["backends", "serdes"],
    name: Any,
    data: Mapping[str, Any],
    path: KeyPath,
    problems: Problems,
) -> Options | None:
    """The options of a component; None, with the problems noted, where something is wrong."""
    key = "backend" if group == "backends" else "name"
    if not isinstance(name, str):
        return None  # its type or absence is noted already
    cls = _component(group, name, (*path, key) if group == "backends" else path, problems)
    if cls is None:
        return None
    known = [*cls.Options.model_fields, *(_TIER_KEYS if group == "backends" else ())]
    options: Options | None = problems.check(cls.Options, data, path, known)
    return options


def _component(
    group: Literal["backends", "serdes"], name: str, path: KeyPath, problems: Problems
) -> Any:
    if not _NAME.fullmatch(name):
        instead = "; a url stands under url" if ":" in name else ""
        problems.add(path, f"expected a name such as disk or zstd{instead}; found {shown(name)}")
        return None
    try:
        cls = component(group, name)
    except ConfigError as error:
        problems.add(path, masked(str(error)))
        return None
    fault = _fault(cls, name, _BASES[group])
    if fault:
        problems.add(path, f"{name!r} is not usable: {cls!r} {fault}")
    return None if fault else cls


def _fault(cls: Any, name: str, base: type[Any]) -> str:
    """What keeps a plugin's class from being one, or ""."""
    if not isinstance(cls, type):
        return f"is no {base.__name__}"
    if not issubclass(cls, base):
        return reloaded(cls, base) or f"is no {base.__name__}"
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if not hasattr(cls, "Options"):
        missing.append("Options")
    if missing:
        return f"lacks {', '.join(missing)}"
    options: Any = getattr(cls, "Options", None)
    if not (isinstance(options, type) and issubclass(options, Options)):
        return reloaded(options, Options) or "has Options that do not derive from lmcache_core's"
    if base is Serde and getattr(cls, "name", None) != name:
        return f"has the name {getattr(cls, 'name', None)!r}: frames would not find it again"
    return ""


def _pipeline(data: Any, path: KeyPath, problems: Problems) -> tuple[SerdeConfig, ...] | None:
    """A pipeline of a name, {name: options}, {name: ..., option: ...}, or a list of these."""
    entries = [data] if isinstance(data, str | Mapping | SerdeConfig) else data
    if not isinstance(entries, list | tuple):
        problems.add(path, f"expected serde names such as [zstd]; found {shown(data)}")
        return None
    found = [_serde(entry, (*path, index), problems) for index, entry in enumerate(entries)]
    serdes = tuple(serde for serde in found if serde is not None)
    if len(serdes) < len(found):
        return None
    try:
        Pipeline([serde.create() for serde in serdes])
    except Exception as error:  # a plugin's may be any
        problems.add(path, masked(str(error)) or repr(error))
        return None
    return serdes


def _serde(entry: Any, path: KeyPath, problems: Problems) -> SerdeConfig | None:
    if isinstance(entry, SerdeConfig):
        return entry
    if isinstance(entry, str):
        entry = {"name": entry}
    entry = problems.mapping(entry, path)
    if entry is not None and "name" not in entry and len(entry) == 1:
        name, options = next(iter(entry.items()))
        path = (*path, name)
        entry = problems.mapping({} if options is None else options, path)
        entry = None if entry is None else {**entry, "name": name}
    if entry is None:
        return None
    name = {key: entry.pop(key) for key in ("name",) if key in entry}
    options = _options("serdes", name.get("name"), entry, path, problems)
    built = problems.check(SerdeConfig, {**name, "options": options or _NO_OPTIONS}, path)
    return None if options is None else built


def _refuse_shared_stores(tiers: Sequence[TierConfig], problems: Problems) -> None:
    """Two tiers on one store would count and evict each other's chunks."""
    seen: dict[tuple[str, str], TierConfig] = {}
    for index, each in enumerate(tiers):
        try:
            identity = each.options.identity()
        except Exception as error:  # a plugin's may be any
            problems.add(("tiers", index), f"its identity fails: {masked(str(error))}")
            continue
        if identity is None:
            continue
        first = seen.setdefault((each.backend, identity), each)
        if first is not each:
            problems.add(("tiers", index), f"the same store as {first.where}: {masked(identity)}")


def _named_apart(tiers: Sequence[TierConfig]) -> list[TierConfig]:
    """Tiers whose names differ: disk, disk2, ..."""
    taken: set[str] = set()
    named: list[TierConfig] = []
    for each in tiers:
        name, number = each.name, 2
        while name in taken:
            name, number = f"{each.name}{number}", number + 1
        taken.add(name)
        named.append(each if name == each.name else each.model_copy(update={"name": name}))
    return named


def _has_options(data: Mapping[str, Any]) -> bool:
    return isinstance(data.get("options"), Options)


def _set_fields(model: BaseModel | None) -> dict[str, Any]:
    """What was said, and not what is so by default."""
    said = model.model_fields_set if model else ()
    return {key: value for key, value in model or () if key in said}
