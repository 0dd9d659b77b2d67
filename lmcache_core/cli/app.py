"""App: all commands together, and how each of them fails."""

from __future__ import annotations

import logging
import sys

import typer

from lmcache_core.cli import config, explain, plugins, stores
from lmcache_core.cli.output import note
from lmcache_core.errors import LmcacheError
from lmcache_core.plugins.secrets import masked

FAILED, WRONG = 1, 2
"""Exit codes: what was looked for is not right; what was asked for cannot be done."""

app = typer.Typer(
    name="lmcache-core",
    help="What is in the cache, whether its config is right, and how to clean it up.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for module in (config, plugins, stores, explain):
    module.add_to(app)


def run() -> None:
    """Run what the command line says; whatever is wrong with it is a sentence and exit code 2."""
    logging.getLogger("lmcache_core").addHandler(logging.StreamHandler(sys.stderr))
    try:
        app()
    except (LmcacheError, OSError) as error:
        note(f"lmcache-core: {masked(str(error))}")
        sys.exit(WRONG)
