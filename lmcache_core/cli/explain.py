"""explain: how far the stores have a prompt, under each namespace, and what tells these apart."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import Annotated, Any

import typer

from lmcache_core.cli.output import Json, note, rows
from lmcache_core.cli.stores import ConfigFile, Model, at_rest
from lmcache_core.config import loading
from lmcache_core.engine.contents import Content
from lmcache_core.engine.engine import CacheEngine
from lmcache_core.engine.removal import Selection
from lmcache_core.errors import ConfigError
from lmcache_core.kv.namespace import Namespace


def add_to(app: typer.Typer) -> None:
    """Add this command."""
    app.command(epilog="Example: lmcache-core explain prompt.json -c cache.yaml")(explain)


def explain(
    prompt: Annotated[Path, typer.Argument(help="A JSON file: a list of token ids.")],
    config: ConfigFile = None,
    model: Model = None,
    json: Json = False,
) -> None:
    """Why did this prompt miss? Where its hit ends under each namespace that is stored, and in
    which fields the others differ from the one that has most of it."""
    tokens = _tokens(prompt)
    with at_rest(loading.load(config)) as cache:
        found = cache.contents()
        named = _by_digest(found.found, Selection(model=model))
        lines = [_line(cache, namespace, tokens) for namespace in named]
    for tier, why in found.failed.items():
        note(f"{tier}: {why}")
    if not lines:
        raise ConfigError("nothing is stored, of any model that was asked for")
    lines.sort(key=lambda line: -line["hit"])
    best = lines[0]["document"]
    for line in lines:
        line["differs_in"] = ", ".join(_differences(best, line["document"]))
    rows(lines, ["model", "hit", "of", "ends", "differs in", "namespace"], as_json=json)
    if not lines[0]["hit"]:
        raise typer.Exit(1)


def _tokens(file: Path) -> list[int]:
    try:
        tokens = json_.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: expected a JSON list of token ids: {error}") from None
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise ConfigError(f"{file}: expected a JSON list of token ids")
    return tokens


def _by_digest(found: list[Content], selection: Selection) -> list[Namespace]:
    named = {each.digest: each.namespace for each in found if selection.takes(each.namespace)}
    return [namespace for namespace in named.values() if namespace is not None]


def _line(cache: CacheEngine, namespace: Namespace, tokens: list[int]) -> dict[str, Any]:
    keys = cache.keys(namespace, tokens)
    hit = cache.lookup(keys).chunks
    behind = sum(tier is not None for tier in cache.locate(keys[hit:]))
    ends = f"{behind} chunks lie behind a hole" if behind else "never stored, or evicted"
    if not keys:
        ends = f"shorter than a chunk of {cache.chunk_size} tokens"
    return {
        "model": namespace.model,
        "hit": hit,
        "of": len(keys),
        "ends": "all of it is there" if keys and hit == len(keys) else ends,
        "namespace": namespace.digest.hex(),
        "document": namespace.model_dump(mode="json"),
    }


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name, value in one.items() if other[name] != value]
