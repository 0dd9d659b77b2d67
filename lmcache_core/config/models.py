"""Config: what is stored where. From YAML, from the environment or from Python.

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

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmcache_core.backend import StorageBackend
from lmcache_core.config import lmcache as _lmcache_settings
from lmcache_core.config import positions as _yaml
from lmcache_core.config.positions import KeyPath
from lmcache_core.errors import ConfigError
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.plugins.registry import component
from lmcache_core.plugins.units import Duration, Size
from lmcache_core.serde import Serde

__all__ = ["Config", "Duration", "SerdeConfig", "Size", "TierConfig", "load", "strict_requested"]

M = TypeVar("M", bound=BaseModel)
_SECRET = re.compile(r"pass|secret|token|credential|salt|(^|_)key($|_)", re.IGNORECASE)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class _SerdeFields(_Model):
    name: str


class _TierFields(_Model):
    """The keys that every tier has."""

    name: str = ""
    backend: str
    serde: Any = ()
    deadline: Duration = 1.0
    queue: Size = 1 << 30
    when_full: Literal["drop", "block"] = "drop"


class _ConfigFields(_Model):
    chunk_size: int = Field(default=256, ge=1, strict=True)
    strict: bool = Field(default=False, strict=True)
    load: Literal["when_faster", "always"] = "when_faster"
    tiers: list[Any] = Field(min_length=1)


class SerdeConfig(_SerdeFields):
    """One step of a tier's serde chain."""

    options: BaseModel

    def create(self) -> Serde:
        """The serde itself."""
        serde: Serde = component("serdes", self.name)(self.options)
        return serde


class TierConfig(_TierFields):
    """One tier.

    name: how logs and metrics call it; the backend's name unless given.
    deadline: seconds that a call may take before it counts as failed.
    queue: bytes that may wait to be written to a slow tier.
    when_full: what happens to a chunk when they do: "drop" it, or "block" the storing thread.
    options: the backend's own keys. In YAML, and when constructing, they stand beside the others.
    """

    serde: tuple[SerdeConfig, ...] = ()
    options: BaseModel = Field(repr=False)
    where: str = Field(default="tier", repr=False)
    """Where it was configured, for messages."""

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not isinstance(data.get("options"), BaseModel):
            with _Problems({}) as problems:
                return _tier_fields(data, (), problems)
        return data


class Config(_ConfigFields):
    """All tiers, the fastest first.

    chunk_size: tokens in a chunk.
    strict: what makes reuse impossible, such as a store that does not answer, is an error at start
        rather than a log line.
    load: "when_faster" than computing, where the engine tells how fast it computes, or "always".
    """

    tiers: tuple[TierConfig, ...]  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _checked(cls, data: Any) -> Any:
        tiers = data.get("tiers") if isinstance(data, Mapping) else None
        if isinstance(tiers, tuple) and all(isinstance(tier, TierConfig) for tier in tiers):
            return data
        return _fields(data, {})


def load(source: str | Path | Mapping[str, Any] | Config | None = None) -> Config:
    """A Config from a YAML file, a mapping, or (None) the environment.

    The environment names a file in LMCACHE_CONFIG_FILE or holds LMCache's own LMCACHE_* settings;
    a file may hold LMCache's own keys, too. Raises ConfigError, which lists all that is wrong.
    """
    if isinstance(source, Config):
        return source
    places: dict[KeyPath, str] = {}
    data: Mapping[str, Any]
    if source is None:
        data, places = _lmcache_settings.from_environment(os.environ)
    elif isinstance(source, Mapping):
        data = source
    else:
        data, places = _yaml.read(Path(source))
        if _lmcache_settings.is_lmcache(data):
            data, places = _lmcache_settings.translate(data, places)
    return Config(**_fields(data, places))


def strict_requested(source: str | Path | None = None) -> bool:
    """Whether the environment, or a YAML file (by default the one that it names), says `strict`, be
    it wrong in all else."""
    file = source or os.environ.get("LMCACHE_CONFIG_FILE")
    try:
        data, _ = _yaml.read(Path(file)) if file else ({}, {})
    except ConfigError:
        data = {}
    value = os.environ.get("LMCACHE_STRICT", "")
    return data.get("strict") is True or value.strip().lower() in ("1", "true", "yes", "on")


class _Problems:
    """Collects what is wrong, each with its place; raises all of it at the end of a `with`."""

    def __init__(self, places: Mapping[KeyPath, str]) -> None:
        self._places = places
        self._texts: list[str] = []

    def where(self, path: KeyPath) -> str:
        """Such as "cache.yaml:7: tiers[1].capacity"."""
        known = [path[:n] for n in range(len(path), -1, -1) if path[:n] in self._places]
        return ": ".join(filter(None, [self._places[known[0]] if known else "", _text(path)]))

    def add(self, path: KeyPath, problem: str) -> None:
        where = self.where(path)
        self._texts.append(f"{where}: {problem}" if where else problem)

    def check(
        self, model: type[M], data: Mapping[str, Any], path: KeyPath, known: Sequence[str] = ()
    ) -> M | None:
        """`data` as `model`; None, with the problems noted, where it does not fit.

        `known`: further keys that could have been meant at this place.
        """
        try:
            return model.model_validate(dict(data))
        except ValidationError as error:
            for details in error.errors(include_url=False):
                loc = tuple(step for step in details["loc"] if isinstance(step, str | int))
                names = _fields_at(model, loc[:-1]) if loc[1:] else [*model.model_fields, *known]
                self.add((*path, *loc), _explain(details, names))
            return None

    def __enter__(self) -> _Problems:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._texts:
            raise ConfigError("\n".join(self._texts))


def _text(path: KeyPath) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


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
        close = difflib.get_close_matches(key, known, 1)
        hint = f", did you mean {close[0]!r}?" if close else "."
        return f"unknown key{hint} Known: {', '.join(sorted(set(known)))}"
    if kind == "missing":
        return "required, but not there"
    if kind == "value_error":
        expected = str(context["error"])
    else:
        expected = str(details["msg"]).replace("Input should be", "expected")
    return f"{expected[0].lower()}{expected[1:]}; found {_shown(key, details['input'])}"


def _shown(key: str, value: object) -> str:
    if _SECRET.search(key):
        return "*** (not shown)"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_shown(str(name), v)}" for name, v in value.items()) + "}"
    # In front of @ may stand a password, whatever is wrong with the rest.
    text = re.sub(r"^(['\"]\w+:/+)?.*@", r"\1***@", repr(value), flags=re.DOTALL)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fields(data: Any, places: Mapping[KeyPath, str]) -> dict[str, Any]:
    """The fields of a Config from plain data."""
    with _Problems(places) as problems:
        data = _mapping(data, (), problems)
        top = problems.check(_ConfigFields, data, ())
        raw = data.get("tiers")
        tiers: list[TierConfig] = []
        for index, tier in enumerate(raw if isinstance(raw, list | tuple) else ()):
            built = _tier(tier, ("tiers", index), problems)
            if built is not None:
                tiers.append(built)
        _refuse_shared_stores(tiers, problems)
    own = top.model_dump(exclude={"tiers"}) if top else {}
    return {**own, "tiers": tuple(_named_apart(tiers))}


def _mapping(data: Any, path: KeyPath, problems: _Problems) -> dict[str, Any]:
    if isinstance(data, Mapping) and all(isinstance(key, str) for key in data):
        return dict(data)
    problems.add(path, f"expected keys and values; found {_shown('', data)}")
    return {}


def _tier(data: Any, path: KeyPath, problems: _Problems) -> TierConfig | None:
    if isinstance(data, TierConfig):
        return data
    fields = _tier_fields(_mapping(data, path, problems), path, problems)
    return TierConfig(**fields) if fields else None


def _tier_fields(
    data: Mapping[str, Any], path: KeyPath, problems: _Problems
) -> dict[str, Any] | None:
    """The fields of a TierConfig; None where something is wrong."""
    own = {key: value for key, value in data.items() if key in _TierFields.model_fields}
    rest = {key: value for key, value in data.items() if key not in own}
    fields = problems.check(_TierFields, own, path)
    serdes = _serdes(own.get("serde", ()), (*path, "serde"), problems)
    backend = own.get("backend")
    cls = _component("backends", backend, (*path, "backend"), problems)
    if cls is None:
        return None
    options = problems.check(cls.Options, rest, path, known=tuple(_TierFields.model_fields))
    if fields is None or options is None or serdes is None:
        return None
    return {
        **fields.model_dump(exclude={"serde"}),
        "name": fields.name or backend,
        "serde": serdes,
        "options": options,
        "where": problems.where(path) or "tier",
    }


def _component(
    group: Literal["backends", "serdes"], name: Any, path: KeyPath, problems: _Problems
) -> Any:
    if not isinstance(name, str):
        return None  # its type or absence is noted already
    try:
        cls = component(group, name)
    except ConfigError as error:
        problems.add(path, str(error))
        return None
    fault = _fault(cls, name, StorageBackend if group == "backends" else Serde)
    if fault:
        problems.add(path, f"{name!r} is not usable: {cls!r} {fault}")
    return None if fault else cls


def _fault(cls: Any, name: str, base: type) -> str:
    """What keeps a plugin's class from being one, or ""."""
    if not (isinstance(cls, type) and issubclass(cls, base)):
        return f"is no {base.__name__}"
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if not hasattr(cls, "Options"):
        missing.append("Options")
    if missing:
        return f"lacks {', '.join(missing)}"
    if base is Serde and getattr(cls, "name", None) != name:
        return f"has the name {getattr(cls, 'name', None)!r}: frames would not find it again"
    return ""


def _serdes(data: Any, path: KeyPath, problems: _Problems) -> tuple[SerdeConfig, ...] | None:
    """A chain, checked: a name, {name: options}, {name: ..., option: ...}, or a list of these."""
    entries = [data] if isinstance(data, str | Mapping | SerdeConfig) else data
    if not isinstance(entries, list | tuple):
        problems.add(path, f"expected serde names such as [zstd]; found {_shown('', data)}")
        return None
    found = [_serde(entry, (*path, index), problems) for index, entry in enumerate(entries)]
    serdes = tuple(serde for serde in found if serde is not None)
    if len(serdes) < len(found):
        return None
    try:
        Pipeline([serde.create() for serde in serdes])
    except Exception as error:  # a plugin's may be any
        problems.add(path, str(error) or repr(error))
        return None
    return serdes


def _serde(entry: Any, path: KeyPath, problems: _Problems) -> SerdeConfig | None:
    if isinstance(entry, SerdeConfig):
        return entry
    if isinstance(entry, str):
        entry = {"name": entry}
    entry = _mapping(entry, path, problems)
    if "name" not in entry and len(entry) == 1:
        name, options = next(iter(entry.items()))
        path = (*path, name)
        entry = {**_mapping(options if options is not None else {}, path, problems), "name": name}
    if problems.check(_SerdeFields, {k: v for k, v in entry.items() if k == "name"}, path) is None:
        return None
    name = entry.pop("name")
    cls = _component("serdes", name, path, problems)
    options = cls and problems.check(cls.Options, entry, path)
    return SerdeConfig(name=name, options=options) if options is not None else None


def _refuse_shared_stores(tiers: Sequence[TierConfig], problems: _Problems) -> None:
    """Two tiers on one store would count and evict each other's chunks."""
    seen: dict[tuple[str, str], TierConfig] = {}
    for index, tier in enumerate(tiers):
        identity = getattr(tier.options, "identity", None)
        if identity is None:
            continue
        first = seen.setdefault((tier.backend, identity()), tier)
        if first is not tier:
            problems.add(("tiers", index), f"the same store as {first.where}: {identity()}")


def _named_apart(tiers: Sequence[TierConfig]) -> list[TierConfig]:
    """Tiers whose names differ: disk, disk2, ..."""
    taken: set[str] = set()
    named: list[TierConfig] = []
    for tier in tiers:
        name, number = tier.name, 2
        while name in taken:
            name, number = f"{tier.name}{number}", number + 1
        taken.add(name)
        named.append(tier.model_copy(update={"name": name}))
    return named
