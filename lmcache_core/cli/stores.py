"""status, ls, inspect, verify, clear: what lies in the stores of a config."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcache_core.cli.output import Json, document, note, rows, size
from lmcache_core.config import loading
from lmcache_core.config.models import Config, TierConfig
from lmcache_core.engine.contents import Content
from lmcache_core.engine.engine import CacheEngine
from lmcache_core.engine.removal import Selection
from lmcache_core.errors import ConfigError, FrameError
from lmcache_core.frames.format import HEADER, Head, parse_header
from lmcache_core.kv.keys import ChunkKey

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="A YAML file. Without it the environment is read."),
]
Model = Annotated[str | None, typer.Option(help="Only of this model's name.")]
Tenant = Annotated[str | None, typer.Option(help="Only of this tenant.")]
_IN_PROCESS = "is memory of one process: ask the engine"
_NOT_MADE = "not made yet"
_RIGHT = "right"
_NOT_SUMMED = "none: memory of this host is not summed"


def add_to(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(epilog="Example: lmcache-core status -c cache.yaml")(status)
    app.command(epilog="Example: lmcache-core ls -c cache.yaml --model org/model")(ls)
    app.command(epilog="Example: lmcache-core inspect 5f3c... -c cache.yaml")(inspect)
    app.command(epilog="Example: lmcache-core verify -c cache.yaml --remove")(verify)
    app.command(epilog="Example: lmcache-core clear -c cache.yaml --model org/model --yes")(clear)


@contextlib.contextmanager
def at_rest(config: Config) -> Iterator[CacheEngine]:
    """The stores of a config that outlive a process and are there: nothing is made."""
    there = [tier for tier in config.tiers if _is_there(tier)]
    if not there:
        raise ConfigError("no tier has anything that outlives its process")
    with CacheEngine(config.model_copy(update={"tiers": tuple(there)})) as cache:
        yield cache


def _is_there(tier: TierConfig) -> bool:
    if tier.backend_class.locality == "process":
        note(f"{tier.name}: {_IN_PROCESS}")
        return False
    if not tier.options.made():
        note(f"{tier.name}: {_NOT_MADE}")
        return False
    return True


def status(config: ConfigFile = None, json: Json = False) -> None:
    """How full each store is, and whether it answers."""
    loaded = loading.load(config)
    with at_rest(loaded) as cache:
        found = cache.contents()
    tiers = []
    for tier in loaded.tiers:
        here = [each for each in found.found if each.tier == tier.name]
        used = sum(each.nbytes for each in here)
        capacity = getattr(tier.options, "capacity", None)
        state = found.failed.get(tier.name, "answers" if tier.options.made() else _NOT_MADE)
        if tier.backend_class.locality == "process":
            state = _IN_PROCESS
        tiers.append(
            {
                "tier": tier.name,
                "backend": tier.backend,
                "state": state,
                "chunks": sum(each.chunks for each in here),
                "used": size(used),
                "used_bytes": used,
                "capacity": "" if capacity is None else size(capacity),
                "capacity_bytes": capacity,
                "full": f"{used / capacity:.1%}" if capacity else "",
            }
        )
    columns = ["tier", "backend", "state", "chunks", "used", "capacity", "full"]
    rows(tiers, columns, as_json=json)
    if found.failed:
        raise typer.Exit(1)


def ls(
    config: ConfigFile = None, model: Model = None, tenant: Tenant = None, json: Json = False
) -> None:
    """What is stored, by model, tenant and tier."""
    with at_rest(loading.load(config)) as cache:
        found = cache.contents()
    selection = Selection(model=model, tenant=tenant)
    lines = [_line(each) for each in found.found if selection.takes(each.namespace)]
    columns = ["tier", "model", "tenant", "adapter", "dtype", "rank", "chunks", "size", "namespace"]
    rows(lines, columns, as_json=json)
    _tell(found.failed)


def _line(content: Content) -> dict[str, Any]:
    named = content.namespace
    line: dict[str, Any] = {
        "tier": content.tier,
        "chunks": content.chunks,
        "size": size(content.nbytes),
        "bytes": content.nbytes,
        "namespace": content.digest.hex(),
    }
    if named is None:
        return line | {"model": "(cannot be read here)"}
    return line | {
        "model": named.model,
        "tenant": named.tenant[:8],
        "adapter": named.adapter,
        "dtype": ", ".join(sorted({group.dtype for group in named.layout.groups})),
        "rank": f"{named.rank}/{named.world}",
        "weights": str(named.weights),
        "document": named.model_dump(mode="json") if named else None,
    }


def inspect(
    what: Annotated[str, typer.Argument(help="A chunk's key (its beginning will do), or a file.")],
    config: ConfigFile = None,
) -> None:
    """What one chunk says of itself: tokens, pipeline, shapes, namespace, checksum."""
    path = Path(what)
    if path.is_file():
        data = path.read_bytes()
        return document({"file": what, **_frame(data, None)})
    if len(what) < 8 or set(what) - set("0123456789abcdef"):
        raise ConfigError(f"{what}: neither a file nor the beginning of a key (8 to 64 hex digits)")
    with at_rest(loading.load(config)) as cache:
        found = [
            {"tier": tier.name, "key": str(each.key), **_frame(tier.frame(each.key), each.key)}
            for tier in cache.stores
            for each in tier.scan(60.0)
            if str(each.key).startswith(what)
        ]
    if not found:
        raise ConfigError(f"{what}: no store has a chunk whose key begins so")
    document(found)


def _frame(data: bytes, key: ChunkKey | None) -> dict[str, Any]:
    parts = [memoryview(data)]
    try:
        head = Head.read(parts, verify=False)
        checksum = _checksum(parts, head)
        raw = data[HEADER : HEADER + head.length]
        named = ChunkKey(head.key)
        header = parse_header(raw, named.namespace, head.tokens)
    except FrameError as error:
        return {"stored_bytes": len(data), "damaged": str(error)}
    return {
        "key": str(named),
        "stored_bytes": len(data),
        "raw_bytes": sum(spec.nbytes for spec in header.namespace.layout.tensors(head.tokens)),
        "checksum": checksum,
        "tokens": head.tokens,
        "index": head.index,
        "pipeline": [name for name, _ in header.steps],
        "tensors": {spec.name: [spec.dtype, list(spec.shape)] for spec in header.specs},
        "namespace": header.namespace.model_dump(mode="json"),
    } | ({} if key in (None, named) else {"damaged": f"lies under the key {key}"})


def _checksum(parts: list[memoryview], head: Head) -> str:
    if not head.summed:
        return _NOT_SUMMED
    try:
        Head.read(parts, verify=True)
    except FrameError as error:
        return str(error)
    return _RIGHT


def verify(
    config: ConfigFile = None,
    remove: Annotated[bool, typer.Option(help="Remove what is damaged.")] = False,
    json: Json = False,
) -> None:
    """Read every chunk of every store and compare its checksum."""
    damaged: list[dict[str, Any]] = []
    with at_rest(loading.load(config)) as cache:
        for tier in cache.stores:
            for each in tier.scan(60.0):
                found = _frame(tier.frame(each.key), each.key)
                problem = found.get("damaged") or found["checksum"]
                if problem not in (_RIGHT, _NOT_SUMMED):
                    damaged.append({"tier": tier.name, "key": str(each.key), "problem": problem})
            if remove:
                tier.take_out([ChunkKey.parse(d["key"]) for d in damaged if d["tier"] == tier.name])
    rows(damaged, ["tier", "key", "problem"], as_json=json)
    note(f"{len(damaged)} damaged chunks{', removed' if remove and damaged else ''}")
    if damaged and not remove:
        raise typer.Exit(1)


def clear(
    config: ConfigFile = None,
    model: Model = None,
    tenant: Tenant = None,
    everything: Annotated[bool, typer.Option("--all", help="All there is.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, say what would go.")] = False,
    json: Json = False,
) -> None:
    """Remove what is stored of a model or a tenant. Says what would go, unless --yes is given."""
    if everything == bool(model or tenant):
        raise ConfigError("clear: say --model, --tenant or both; or --all")
    selection = Selection(model=model, tenant=tenant)
    with at_rest(loading.load(config)) as cache:
        if yes:
            removal = cache.clear(model=model, tenant=tenant)
            gone, failed = removal.chunks, removal.failed
        else:
            found = cache.contents()
            gone, failed = {info.name: 0 for info in cache.tiers}, found.failed
            for each in found.found:
                gone[each.tier] += each.chunks if selection.takes(each.namespace) else 0
    rows(
        [{"tier": name, "chunks": count} for name, count in gone.items()],
        ["tier", "chunks"],
        as_json=json,
    )
    if not yes:
        note("nothing was removed: say --yes")
    _tell(failed)


def _tell(failed: dict[str, str]) -> None:
    for tier, why in failed.items():
        note(f"{tier}: {why}")
    if failed:
        raise typer.Exit(1)
