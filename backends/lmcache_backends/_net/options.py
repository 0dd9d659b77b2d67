"""What the options of the network backends share: where a server is, who we are to it, how long it
keeps what it gets."""

from __future__ import annotations

import os
import re
import ssl
from typing import Annotated, NamedTuple
from urllib.parse import unquote, urlsplit

from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic.types import PathType

from lmcache_core.backend import ConfigError, Duration, LocalPath, Options, unquoted

Prefix = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
"""What the keys of one deployment begin with, so that several share a server."""


def _url(value: object) -> object:
    if not isinstance(value, str):
        return value
    variable = re.search(r"\$\{(\w+)\}", value)
    if variable:
        raise ValueError(
            f"expected a url; {variable[0]} in it is not replaced, but a password can come from a "
            f"variable: password_env: {variable[1]}"
        )
    return unquoted(value)


SecretUrl = Annotated[SecretStr, BeforeValidator(_url)]
"""A url that may hold a password. Quotes and blanks around it are left out."""

File = Annotated[LocalPath, PathType("file")]
"""A file that is there."""


class Address(NamedTuple):
    """Of a server; a unix socket has a path and no port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else self.host

    @classmethod
    def parse(cls, text: str, port: int) -> Address:
        """From `host` or `host:port`; `port` where there is none. Raises ValueError."""
        parts = urlsplit(f"//{text}")
        if not parts.hostname or parts.path:
            raise ValueError
        parts.hostname.encode("idna")  # as a resolver does; raises for what can be no name
        return cls(parts.hostname, parts.port or port)


class Login(NamedTuple):
    """What stands before the host of a url; "" for what is not there."""

    username: str
    password: str

    @classmethod
    def parse(cls, netloc: str) -> tuple[Login, str]:
        """Of `[username[:password]@]rest`, and the rest."""
        login, _, rest = netloc.rpartition("@")
        username, _, password = login.partition(":")
        return cls(unquote(username), unquote(password)), rest

    def with_password_of(self, variable: str | None) -> Login:
        """The same, but for the password that an environment variable holds, if one is named."""
        return self._replace(password=from_environment(variable) or self.password)


def from_environment(name: str | None) -> str:
    """A password that a variable holds; "" where no variable is named."""
    if name is None:
        return ""
    if name not in os.environ:
        hidden = name if re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) else "that is named"
        raise ConfigError(f"the environment variable {hidden} is not set")
    return os.environ[name]


class Tls(Options):
    """`ca`: a file of certificates to trust instead of the system's. `cert`, `key`: files of the
    client's own certificate. `check_hostname`: whether the server's must name the host."""

    ca: File | None = None
    cert: File | None = None
    key: File | None = None
    check_hostname: bool = True

    def context(self) -> ssl.SSLContext:
        """The same for a socket. Raises ConfigError for a file that cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert:
                context.load_cert_chain(self.cert, self.key)
        except OSError as error:
            raise ConfigError(f"tls: a certificate or key cannot be used: {error}") from None
        context.check_hostname = self.check_hostname
        return context


class Expiry(Options):
    """`ttl`: after how long a chunk is forgotten; never unless given. `refresh`: a use begins it
    anew."""

    ttl: Duration | None = None
    refresh: bool = False

    @model_validator(mode="after")
    def _ttl_to_refresh(self) -> Expiry:
        if self.refresh and self.ttl is None:
            raise ValueError("refresh needs a ttl")
        return self
