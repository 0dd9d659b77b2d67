"""How a connector starts: where its config comes from, and what happens where there is none."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lmcache_core.config.loading import load, strict_requested
from lmcache_core.config.models import Config
from lmcache_core.errors import ConfigError

log = logging.getLogger("lmcache_core")

_said: set[tuple[str, str]] = set()
"""What was said already: both sides of a connector may be in one process."""


def read_config(entry: Mapping[str, Any], where: str) -> Config:
    """The Config that a connector's own settings describe.

    `entry`: `config_file`, or the keys of one (`tiers` ...), and perhaps `strict`; with nothing
    but that the environment says. `where`: how messages name the entry. Raises ConfigError.
    """
    own = {key: value for key, value in entry.items() if key not in ("config_file", "strict")}
    file = entry.get("config_file")
    if file and own:
        raise ConfigError(
            f"{where}: expected either config_file or its keys; found {', '.join(own)}"
        )
    config = load(file or own or None, where)
    return config.model_copy(update={"strict": config.strict or is_strict(entry)})


def is_strict(entry: Mapping[str, Any]) -> bool:
    """Whether what makes reuse impossible is to stop the engine, be the rest wrong or right."""
    return bool(entry.get("strict")) or strict_requested(entry.get("config_file"))


def go_on_without(
    engine: str, error: BaseException, *, strict: bool, logger: logging.Logger = log
) -> None:
    """Say in one line, once, that `engine` serves without a cache; or raise where it is strict."""
    if strict:
        raise error
    cause = str(error) or repr(error)
    if (engine, cause) not in _said:
        _said.add((engine, cause))
        logger.warning("lmcache-core is off, %s goes on without it: %s", engine, cause)
