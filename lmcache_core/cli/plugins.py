"""plugins: every component that is installed, whose it is, and why one cannot be used."""

from __future__ import annotations

from typing import get_args

import typer

from lmcache_core.cli.output import Json, rows
from lmcache_core.errors import ConfigError
from lmcache_core.plugins.registry import Group, component, distributions, known


def add_to(app: typer.Typer) -> None:
    """Add this command."""
    app.command(epilog="Example: lmcache-core plugins --json")(plugins)


def plugins(json: Json = False) -> None:
    """Every backend, serde, policy, connector and plugin that is installed, and from where."""
    found = [_row(group, name) for group in get_args(Group) for name in known(group)]
    rows(found, ["kind", "name", "from", "state"], as_json=json)


def _row(group: Group, name: str) -> dict[str, str]:
    try:
        component(group, name)
        state = "ok"
    except ConfigError as error:
        state = str(error)
    return {"kind": group, "name": name, "from": distributions(group, name), "state": state}
