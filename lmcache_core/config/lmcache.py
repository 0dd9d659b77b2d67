"""LMCache's own settings, so that an existing deployment moves over: its YAML keys, its LMCACHE_*.

A setting that has no equivalent here is an error that names it, never ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lmcache_core.config import positions as _yaml
from lmcache_core.config.positions import KeyPath
from lmcache_core.errors import ConfigError

_KEYS = {
    "chunk_size",
    "local_cpu",
    "max_local_cpu_size",
    "local_disk",
    "max_local_disk_size",
    "remote_url",
    "remote_serde",
    "strict",
    "use_local",
    "use_remote",
}
_PREFIX = "LMCACHE_"
_FILE = "LMCACHE_CONFIG_FILE"
_STRICT = "LMCACHE_STRICT"
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0", ""), False),
}
_BACKENDS = {
    "redis": "redis",
    "rediss": "redis",
    "unix": "redis",
    "memcached": "memcached",
    "s3": "s3",
}
_SERDES: dict[str, list[str]] = {"naive": [], "raw": [], "safetensor": ["safetensors"]}
_DEFAULT_CPU_GIB = 5.0
_NOTHING = f"""nothing says where KV is to be stored. One of:
  a file:         lmcache_core.open("cache.yaml"), or {_FILE}=cache.yaml, which holds
                    tiers:
                      - backend: local_cpu
                        capacity: 8GiB
  the environment: LMCACHE_LOCAL_CPU=true LMCACHE_MAX_LOCAL_CPU_SIZE=8
  Python:          lmcache_core.open({{"tiers": [
                       {{"backend": "local_cpu", "capacity": "8GiB"}}]}})"""

Data = tuple[dict[str, Any], dict[KeyPath, str]]
"""A config as plain data, and where each key path of it was set."""


def is_lmcache(data: Mapping[str, Any]) -> bool:
    """Whether a file holds LMCache's keys rather than ours."""
    return "tiers" not in data and bool((_KEYS - {"chunk_size", "strict"}) & set(data))


def from_environment(environment: Mapping[str, str]) -> Data:
    """The config that LMCACHE_* variables describe."""
    variables = {
        name: value
        for name, value in environment.items()
        if name.startswith(_PREFIX) and name != _FILE
    }
    file = environment.get(_FILE)
    data: dict[str, Any] = {}
    places: dict[KeyPath, str] = {}
    if file:
        data, places = _yaml.read(Path(file))
        if not is_lmcache(data):
            if _STRICT in variables:
                places["strict",] = f"environment: {_STRICT}"
                own = _Settings({"strict": variables.pop(_STRICT)}, places)
                data = {**data, "strict": own.boolean("strict", default=False)}
            if variables:
                raise ConfigError(
                    f"{', '.join(sorted(variables))}: set beside {_FILE}={file}, which lists its "
                    "tiers itself; keep one of the two"
                )
            return data, places
    if not file and not variables:
        raise ConfigError(_NOTHING)
    for name, value in variables.items():
        key = name.removeprefix(_PREFIX).lower()
        data[key] = value
        places[key,] = f"environment: {name}"
    return translate(data, places)


def translate(data: Mapping[str, Any], places: Mapping[KeyPath, str]) -> Data:
    """LMCache's settings as ours. Raises ConfigError."""
    settings = _Settings(data, places)
    settings.refuse_unknown()
    use_local = settings.boolean("use_local", default=True)
    cpu = settings.boolean("local_cpu", default="use_local" in data and use_local)
    if use_local and cpu:
        size = settings.gib("max_local_cpu_size", default=_DEFAULT_CPU_GIB)
        settings.tier({"backend": "local_cpu", "capacity": size}, "local_cpu")
    path = settings.disk_path()
    if use_local and path:
        size = settings.gib("max_local_disk_size", default=None)
        settings.tier({"backend": "disk", "path": path, "capacity": size}, "local_disk")
    url = data.get("remote_url")
    if settings.boolean("use_remote", default=bool(url)):
        settings.tier(settings.remote(url), "remote_url")
    if not settings.tiers:
        raise ConfigError(_NOTHING)
    config: dict[str, Any] = {"tiers": settings.tiers}
    if "strict" in data:
        config["strict"] = settings.boolean("strict", default=False)
    if "chunk_size" in data:
        config["chunk_size"] = settings.integer("chunk_size")
    return config, settings.ours


class _Settings:
    """LMCache's settings, read one by one, and the tiers that they make."""

    def __init__(self, data: Mapping[str, Any], places: Mapping[KeyPath, str]) -> None:
        self._data, self._places = data, places
        self.tiers: list[dict[str, Any]] = []
        self.ours: dict[KeyPath, str] = {("chunk_size",): self._place("chunk_size")}

    def _place(self, key: str) -> str:
        return self._places.get((key,), key)

    def _spelt(self, key: str, like: str) -> str:
        """A key as it would stand where `like` does: in a file, or in the environment."""
        in_file = not self._place(like).startswith("environment")
        return key if in_file else _PREFIX + key.upper()

    def _wrong(self, key: str, expected: str) -> ConfigError:
        place = self._place(key)
        name = "" if place.startswith("environment") else f": {key}"
        return ConfigError(f"{place}{name}: {expected}")

    def refuse_unknown(self) -> None:
        for key in self._data:
            if key not in _KEYS:
                close = difflib.get_close_matches(str(key), _KEYS, 1)
                hint = f", did you mean {self._spelt(close[0], key)!r}?" if close else "."
                known = ", ".join(self._spelt(each, key) for each in sorted(_KEYS))
                raise self._wrong(key, f"has no equivalent here{hint} Understood: {known}")

    def boolean(self, key: str, *, default: bool) -> bool:
        if key not in self._data:
            return default
        value = self._data[key]
        known = _BOOLEANS.get(str("" if value is None else value).strip().lower())
        if known is None:
            raise self._wrong(key, f"expected true or false; found {value!r}")
        return known

    def integer(self, key: str) -> int:
        try:
            return int(str(self._data[key]))
        except ValueError:
            raise self._wrong(key, f"expected an integer; found {self._data[key]!r}") from None

    def gib(self, key: str, *, default: float | None) -> int:
        """Bytes of a setting in GiB."""
        value = self._data.get(key, default)
        if value is None:
            name = self._spelt(key, "local_disk")
            raise self._wrong("local_disk", f"{name} (in GiB) must be set, too")
        try:
            size = float(value)
        except (TypeError, ValueError):
            size = 0.0
        if isinstance(value, bool) or not 0 < size < 1e9:
            raise self._wrong(key, f"expected a size in GiB such as 5 or 0.5; found {value!r}")
        return int(size * (1 << 30))

    def disk_path(self) -> str:
        """The directory, or "" where the disk is off."""
        value = self._data.get("local_disk")
        text = "" if value is None else str(value).strip()
        if _BOOLEANS.get(text.lower()) is False:
            return ""
        if _BOOLEANS.get(text.lower()):
            raise self._wrong("local_disk", f"expected a directory; found {value!r}")
        return text.removeprefix("file://")

    def remote(self, url: Any) -> dict[str, Any]:
        if not url:
            name = self._spelt("remote_url", "use_remote")
            raise self._wrong("use_remote", f"{name} must be set, too")
        scheme = urlsplit(str(url)).scheme
        if scheme not in _BACKENDS:
            known = ", ".join(f"{name}://" for name in _BACKENDS)
            raise self._wrong("remote_url", f"no equivalent for {scheme}://. Understood: {known}")
        serde = str(self._data.get("remote_serde") or "naive").lower()
        if serde not in _SERDES:
            known = ", ".join(_SERDES)
            raise self._wrong("remote_serde", f"no equivalent for {serde!r}. Understood: {known}")
        return {"backend": _BACKENDS[scheme], "url": str(url), "serde": _SERDES[serde]}

    def tier(self, tier: dict[str, Any], key: str) -> None:
        """Add a tier whose place is that of LMCache's `key`."""
        self.ours["tiers", len(self.tiers)] = self._place(key)
        self.tiers.append(tier)
