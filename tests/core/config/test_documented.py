"""docs/config.md and docs/from-lmcache.md name every key that there is, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from lmcache_core.config.lmcache import Settings
from lmcache_core.config.models import Config, TierConfig
from lmcache_core.plugins.registry import component, known

DOCS = Path(__file__).parents[3] / "docs"
ROW = re.compile(r"^\| *(.*?) *\| *(.*?) *\| *(.*?) *\| *(.*?) *\|", re.MULTILINE)
SHARED = {"prefix", "ttl", "refresh", "password_env", "tls"}
"""Keys that several backends share; their defaults stand at the first."""


def rows() -> dict[tuple[str, str], str]:
    """The default that docs/config.md gives, by component ("" for none) and key."""
    found: dict[tuple[str, str], str] = {}
    owners = [""]
    for line in (DOCS / "config.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not line.startswith("|"):
            owners = [""]
        elif len(cells) == 5:
            owners = re.findall(r"`(\w+)`", cells[0]) or owners
            keys, default = cells[1], cells[3]
        elif len(cells) == 4:
            keys, default = cells[0], cells[2]
        else:
            continue
        if line.startswith("|"):
            for owner in owners if len(cells) == 5 else [""]:
                for key in re.findall(r"`([a-z_]+)(?:\.[a-z_*]+)?`", keys):
                    found[owner, key] = default.strip("`")
    return found


def fields() -> dict[tuple[str, str], FieldInfo]:
    ours = {("", key): field for key, field in Config.model_fields.items()}
    hidden = ("options", "where")
    ours |= {("", k): field for k, field in TierConfig.model_fields.items() if k not in hidden}
    for group in ("backends", "serdes"):
        for name in known(group):  # type: ignore[arg-type]
            cls = component(group, name)  # type: ignore[arg-type]
            if cls.__module__.startswith(("lmcache_backends.", "lmcache_serde.")):
                ours |= {(name, key): field for key, field in cls.Options.model_fields.items()}
    return ours


def test_every_key_is_in_the_tables_and_no_other() -> None:
    assert set(rows()) == set(fields())


@pytest.mark.parametrize("place", sorted(fields()), ids=".".join)
def test_the_default_is_the_models(place: tuple[str, str]) -> None:
    field, said = fields()[place], rows()[place]
    if field.is_required():
        assert said == "required"
    elif isinstance(field.default, bool) and place[1] not in SHARED:
        assert said == str(field.default).lower()
    elif isinstance(field.default, int) and field.default < 1 << 20:
        assert said in (str(field.default), str(field.default).lower(), "")


def test_what_lmcache_says_is_said_to_be_used_or_refused() -> None:
    text = (DOCS / "from-lmcache.md").read_text()
    assert [key for key in Settings.model_fields if f"`{key}`" not in text] == []
