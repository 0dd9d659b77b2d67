"""check, show, schema, import: what a config says, and whether it can be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from lmcache_core.cli.output import Json, document, note, rows
from lmcache_core.config import lmcache, loading, positions
from lmcache_core.config.models import Config, TierConfig
from lmcache_core.config.positions import KeyPath
from lmcache_core.engine.engine import CacheEngine
from lmcache_core.errors import ConfigError
from lmcache_core.plugins.registry import component, known
from lmcache_core.plugins.secrets import masked, shown
from lmcache_core.plugins.units import Duration

File = Annotated[
    Path | None,
    typer.Argument(help="A YAML file. Without it the environment (LMCACHE_*) is read."),
]


_DURATION = get_args(Duration)[1:]
_NOT_MADE = "not made yet"


def add_to(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(epilog="Example: lmcache-core check cache.yaml --connect")(check)
    app.command(epilog="Example: lmcache-core show cache.yaml")(show)
    app.command(epilog="Example: lmcache-core schema > lmcache-core.schema.json")(schema)
    app.command("import", epilog="Example: lmcache-core import lmcache.yaml > cache.yaml")(import_)


def check(
    file: File = None,
    connect: Annotated[bool, typer.Option(help="Open every tier, too.")] = False,
    json: Json = False,
) -> None:
    """Is the config right? All mistakes at once, each with its line and a suggestion."""
    config = loading.load(file)
    tiers = [
        {"tier": tier.name, "backend": tier.backend, "state": "not asked"} for tier in config.tiers
    ]
    if connect:
        for row, tier in zip(tiers, config.tiers, strict=True):
            row["state"] = _state(config, tier)
    rows(tiers, ["tier", "backend", "state"], as_json=json)
    if connect and any(row["state"] not in ("answers", _NOT_MADE) for row in tiers):
        raise typer.Exit(1)


def _state(config: Config, tier: TierConfig) -> str:
    if not tier.options.made():
        return _NOT_MADE
    alone = config.model_copy(update={"tiers": (tier,), "strict": True})
    try:
        CacheEngine(alone).close()
    except ConfigError as error:
        return str(error).removeprefix(f"{tier.where}: ")
    return "answers"


def show(file: File = None, json: Json = False) -> None:
    """The config as it is understood, with every default, and where each value is from; secrets
    are masked."""
    found = effective(loading.load(file))
    if json:
        return document(found)
    places = {} if file is None else positions.read(file)[1]
    source = "default" if file else "the environment, or default"
    for line, path in _lines(found):
        print(f"{line:<44} # {places.get(path, source)}" if path else line)


def _lines(found: dict[str, Any]) -> Iterator[tuple[str, KeyPath]]:
    """The lines of a YAML file, and the place of what each says; () for what says nothing."""
    for key, value in found.items():
        if key != "tiers":
            yield f"{key}: {_yaml(value)}", (key,)
    yield "tiers:", ()
    for number, tier in enumerate(found["tiers"]):
        for place, (key, value) in enumerate(tier.items()):
            dash = "- " if place == 0 else "  "
            yield f"  {dash}{key}: {_yaml(value)}", ("tiers", number, key)


def _yaml(value: object) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000)
        .removesuffix("\n")
        .removesuffix("\n...")
    )


def effective(config: Config) -> dict[str, Any]:
    """What a config says, in the words of a YAML file."""
    tiers = [
        {
            **_plain(tier, ("name", "backend", "deadline", "queue", "when_full")),
            **_plain(tier.options, tuple(type(tier.options).model_fields)),
            "serde": [
                {serde.name: _plain(serde.options, tuple(type(serde.options).model_fields))}
                for serde in tier.serde
            ],
        }
        for tier in config.tiers
    ]
    return {**_plain(config, ("chunk_size", "strict", "load")), "tiers": tiers}


def _plain(model: BaseModel, names: tuple[str, ...]) -> dict[str, Any]:
    fields = type(model).model_fields
    return {name: _value(getattr(model, name), name, fields[name]) for name in names}


def _value(value: object, name: str, field: FieldInfo) -> object:
    if isinstance(value, BaseModel):
        inner = _plain(value, tuple(type(value).model_fields))
        return {name: each for name, each in inner.items() if each is not None}
    if isinstance(value, float) and _is_duration(field):
        return f"{value:g}s"
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, SecretStr):
        return masked(value.get_secret_value())
    return shown(value if isinstance(value, Mapping | list | tuple) else str(value), name).strip(
        "'"
    )


def _is_duration(field: FieldInfo) -> bool:
    inside = [get_args(each)[1:] for each in get_args(field.annotation)]
    return _DURATION in (tuple(field.metadata), *inside)


def schema() -> None:
    """A JSON schema of the config file, for editors."""
    tiers = [_tier_schema(name) for name in known("backends")]
    document(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "lmcache-core",
            "type": "object",
            "properties": {
                **{
                    name: field
                    for name, field in Config.model_json_schema()["properties"].items()
                    if name != "tiers"
                },
                "tiers": {"type": "array", "minItems": 1, "items": {"oneOf": tiers}},
            },
            "required": ["tiers"],
            "additionalProperties": False,
        }
    )


def _tier_schema(name: str) -> dict[str, Any]:
    try:
        options = component("backends", name).Options.model_json_schema()
    except ConfigError as error:
        note(str(error))
        options = {"properties": {}}
    return {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "backend": {"const": name},
            "deadline": {"type": ["string", "number"]},
            "queue": {"type": ["string", "integer"]},
            "when_full": {"enum": ["drop", "block"]},
            "serde": {"type": ["array", "string", "object"]},
            **options["properties"],
        },
        "required": ["backend", *options.get("required", ())],
        "additionalProperties": False,
        "$defs": options.get("$defs", {}),
    }


def import_(file: Annotated[Path, typer.Argument(help="A LMCache file.")]) -> None:
    """What a LMCache file says, as a file of ours. Says what is passed over and what is lost."""
    data, _ = positions.read(file)
    if not lmcache.is_foreign(data):
        raise ConfigError(f"{file}: not a LMCache file: none of its keys is LMCache's")
    print(yaml.safe_dump(effective(loading.load(file)), sort_keys=False), end="")
