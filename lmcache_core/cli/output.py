"""Output: what commands find, as a table for people or as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Row = Mapping[str, Any]


def rows(found: Sequence[Row], columns: Sequence[str], *, as_json: bool) -> None:
    """Print one line for each row; for programs with all that it has."""
    if as_json:
        return document(found)
    table = Table(*columns, box=None, pad_edge=False)
    for row in found:
        table.add_row(*(_cell(row.get(column.replace(" ", "_"))) for column in columns))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def document(found: object) -> None:
    """Print JSON."""
    sys.stdout.write(json.dumps(found, indent=2, default=str) + "\n")


def note(text: str) -> None:
    """Say something beside what was found."""
    sys.stderr.write(f"{text}\n")


def size(nbytes: int) -> str:
    """Bytes for people: 1.5 GiB."""
    amount, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.4g} {units[0]}"


def _cell(value: object) -> str:
    return "" if value is None else str(value)
