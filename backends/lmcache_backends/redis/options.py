"""Options of the redis backend, and other people's URLs for the same servers."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import quote

from pydantic import Field, field_validator, model_validator

from lmcache_backends._net.options import Expiry, Prefix, SecretUrl, Tls
from lmcache_backends.redis.servers import parse_url
from lmcache_core.backend import unquoted

_ALIASES = {
    "valkey": "redis",
    "valkeys": "rediss",
    "resp": "redis",
    "redis-cluster": "redis",
    "redis-sentinel": "redis",
}
_SENTINEL_PORT = 26379
_TRUE = ("true", "1")


class RedisOptions(Expiry):
    """`url`: redis://[user[:password]@]host[:port][/db], rediss:// (TLS) or unix://path[?db=n].
    Several hosts, with commas between, are sentinels or seeds of a cluster.
    `sentinel`: the name of the service whose master the hosts tell. `cluster`: they are nodes of
    one. `password_env`, `sentinel_password_env`: variables that hold the passwords.
    """

    url: SecretUrl
    prefix: Prefix = "lmcache"
    sentinel: str | None = None
    cluster: bool = False
    password_env: str | None = None
    sentinel_password_env: str | None = None
    tls: Tls = Field(default_factory=Tls)

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, data: Any) -> Any:
        """valkey:// is redis://; redis-cluster:// and redis-sentinel:// say how hosts are meant."""
        url = data.get("url") if isinstance(data, dict) else None
        if not isinstance(url, str):
            return data
        scheme, colon, rest = unquoted(url).partition("://")
        if scheme not in _ALIASES:
            return data
        more: dict[str, Any] = {}
        if scheme == "redis-cluster":
            more["cluster"] = True
        elif scheme == "redis-sentinel":
            if not data.get("sentinel"):
                raise ValueError(
                    "redis-sentinel:// needs sentinel: <service>, whose master the sentinels tell"
                )
            rest = _with_port(rest, _SENTINEL_PORT)
        return {**data, **more, "url": f"{_ALIASES[scheme]}{colon}{rest}"}

    @field_validator("url")
    @classmethod
    def _readable(cls, url: SecretUrl) -> SecretUrl:
        parse_url(url.get_secret_value())
        return url

    @model_validator(mode="after")
    def _fits_together(self) -> RedisOptions:
        url = parse_url(self.url.get_secret_value())
        if self.sentinel and self.cluster:
            raise ValueError("expected either sentinel or cluster")
        if len(url.hosts) > 1 and not (self.sentinel or self.cluster):
            raise ValueError("several hosts need sentinel: <service>, or cluster: true")
        if url.db and self.cluster:
            raise ValueError("a cluster has no numbered databases")
        if self.tls != Tls() and url.scheme != "rediss":
            raise ValueError("tls needs a url that begins with rediss://")
        return self

    def identity(self) -> str:
        """The servers, the database and the prefix, without who we are to them."""
        url = parse_url(self.url.get_secret_value())
        hosts = ",".join(str(host) for host in sorted(url.hosts))
        return f"{hosts}/{url.db} {self.sentinel or ''} {self.prefix}"

    @classmethod
    def from_lmcache(cls, url: str, extra: dict[str, Any]) -> dict[str, Any]:
        """Of its URLs, and of what its clients for Redis and Valkey take from `extra_config`."""
        scheme, _, rest = url.partition("://")
        keys: dict[str, Any] = {}
        if scheme == "redis-sentinel":
            keys["sentinel"] = os.environ.get("REDIS_SERVICE_NAME") or "redismaster"
        of = "valkey_" if scheme == "valkey" else ""
        if scheme in ("valkey", "resp"):
            username = str(extra.pop(f"{of}username", ""))
            password = str(extra.pop(f"{of}password", ""))
            if scheme == "resp" and "LMCACHE_RESP_PASSWORD" in os.environ and not password:
                username = username or os.environ.get("LMCACHE_RESP_USERNAME", "")
                keys["password_env"] = "LMCACHE_RESP_PASSWORD"
            if (username or password) and "@" not in rest:
                rest = f"{quote(username, safe='')}:{quote(password, safe='')}@{rest}"
        if scheme == "valkey":
            scheme, rest, more = _valkey(rest, extra)
            keys |= more
        return {"url": f"{scheme}://{rest}", **keys}


def _valkey(rest: str, extra: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Scheme, rest of the url and further keys that LMCache's `valkey_*` come to."""
    keys: dict[str, Any] = {}
    scheme = "valkeys" if _on(extra.pop("tls_enable", False)) else "valkey"
    database = extra.pop("valkey_database", None)
    if extra.pop("valkey_mode", "standalone") == "cluster":
        keys["cluster"] = True
    elif database is not None:
        rest = f"{rest.rstrip('/')}/{database}"
    seconds = extra.pop("valkey_ttl_sec", None)
    if _on(extra.pop("valkey_enable_ttl", False)):
        if seconds is None:
            raise ValueError("valkey_enable_ttl needs valkey_ttl_sec, too")
        keys["ttl"] = f"{seconds}s"
    return scheme, rest, keys


def _on(value: object) -> bool:
    return str(value).strip().lower() in _TRUE


def _with_port(rest: str, port: int) -> str:
    """`[login@]hosts[/path]` with the port where a host has none."""
    login, at, rest = rest.rpartition("@")
    hosts, slash, path = rest.partition("/")
    full = (host if _has_port(host) else f"{host}:{port}" for host in hosts.split(","))
    return f"{login}{at}{','.join(full)}{slash}{path}"


def _has_port(host: str) -> bool:
    return ":" in host.rpartition("]")[2]
