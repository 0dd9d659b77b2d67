"""Loading: from a file, the environment or a mapping to a Config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmcache_core.config import lmcache, positions
from lmcache_core.config.advice import advise
from lmcache_core.config.models import Config, config
from lmcache_core.config.positions import KeyPath
from lmcache_core.config.problems import Problems, in_environment
from lmcache_core.errors import ConfigError
from lmcache_core.plugins.units import unquoted

FILE = "LMCACHE_CONFIG_FILE"
STRICT = "LMCACHE_STRICT"
_NOTHING = f"""nothing says where KV is to be stored. One of:
  a file:         lmcache_core.open("cache.yaml"), or {FILE}=cache.yaml, which holds
                    tiers:
                      - backend: local_cpu
                        capacity: 8GiB
  the environment: LMCACHE_LOCAL_CPU=true LMCACHE_MAX_LOCAL_CPU_SIZE=8
  Python:          lmcache_core.open({{"tiers": [
                       {{"backend": "local_cpu", "capacity": "8GiB"}}]}})"""


def load(
    source: str | Path | Mapping[str, Any] | Config | None = None, written_in: str = ""
) -> Config:
    """A Config from a YAML file, a mapping, or (None) the environment.

    The environment names a file in LMCACHE_CONFIG_FILE or holds LMCache's own LMCACHE_* settings;
    a file may hold LMCache's own keys, too. `written_in`: what a person wrote a mapping down in,
    for messages; as in a file, its durations have units. What is odd, though possible, is logged
    once. Raises ConfigError, which lists all that is wrong.
    """
    if isinstance(source, Config):
        return source
    data: Mapping[str, Any]
    places: dict[KeyPath, str] = {}
    if source is None:
        data, places = _from_environment(os.environ)
    elif isinstance(source, Mapping):
        data = source
        places = {(): written_in} if written_in else {}
    else:
        data, places = positions.read(_path(source))
    with Problems(places) as problems:
        if lmcache.is_foreign(data):
            data = lmcache.translate(data, problems)
        elif source is None and () not in places:  # variables, and none that says anything
            data = {}
        built = config(data, problems) if data else None
        if not data and not problems:
            raise ConfigError(_NOTHING + lmcache.not_understood(problems))
    assert built is not None  # or the problems were raised
    advise(built, problems)
    return built


def environment_is_set() -> bool:
    """Whether a variable is there that is LMCache's or ours, right or wrong; what Kubernetes sets
    for a Service of that name is not."""
    return bool(os.environ.get(FILE) or lmcache.variables(os.environ))


def strict_requested(source: str | Path | None = None) -> bool:
    """Read only the `strict` flag, of the environment or of a YAML file (the one that it names).

    Every error is ignored, so that a caller can tell whether a ConfigError is fatal.
    """
    file = source or unquoted(os.environ.get(FILE, ""))
    try:
        data, _ = positions.read(_path(file)) if file else ({}, {})
    except ConfigError:
        data = {}
    said = (data.get("strict"), os.environ.get(STRICT))
    return any(lmcache.SWITCH.get(unquoted(str(value)).lower()) for value in said)


def _from_environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """What LMCACHE_* variables say: of the file that one names, and over it."""
    file = unquoted(environment.get(FILE, ""))
    data, places = positions.read(_path(file)) if file else ({}, {})
    variables: dict[str, Any] = dict(lmcache.variables(environment))
    if not file and not variables:
        raise ConfigError(_NOTHING)
    if file and not lmcache.is_foreign(data):
        strict = variables.pop("strict", None)
        lmcache.refuse_beside(file, variables)
        variables = {} if strict is None else {"strict": lmcache.switch(strict, STRICT)}
    places |= {(key,): in_environment(lmcache.variable(key)) for key in variables}
    return {**data, **variables}, places


def _path(source: str | Path) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(source)))
