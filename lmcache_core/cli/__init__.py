"""cli: the `lmcache-core` command. Needs lmcache-core[cli]."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; says what to install where typer is missing."""
    try:
        from lmcache_core.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit("lmcache-core: the command line needs more: pip install 'lmcache-core[cli]'")
    run()
