"""Options of the s3 backend, and other people's URLs for the same buckets."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, unquote

from pydantic import Field, field_validator, model_validator

from lmcache_backends._net.options import SecretUrl, Tls
from lmcache_core.backend import Options, unquoted

_AMAZON = re.compile(
    r"""
    (?: (?P<bucket> [\w.-]+) \. )?
    (?P<service> s3 [\w-]*? ) (?: \.dualstack )?
    (?: [.-] (?P<region> [a-z]{2}(?:-[a-z]+)+-\d) )?
    \. amazonaws \. com (?: \. cn )?
    """,
    re.VERBOSE,
)
"""A host of Amazon's that is a bucket's, or S3's."""
_TRUE = ("true", "1")


class S3Options(Options):
    """`url`: s3://[key id:secret@]bucket[/prefix]; credentials that are not there come from where
    AWS's tools look for them: the environment, a profile, the machine's role. `anonymous`: sign
    nothing. `endpoint`: http(s)://host[:port] of a server other than Amazon's. `addressing`: the
    bucket's place in a request's address; `auto` is the host's name for Amazon and the path for
    others. `parallel`: frames that one call may have under way.
    """

    url: SecretUrl
    endpoint: str | None = Field(default=None, pattern=r"^https?://[^/@\s]+/?$")
    region: str | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    anonymous: bool = False
    parallel: int = Field(default=16, ge=1, le=256)
    tls: Tls = Field(default_factory=Tls)

    @model_validator(mode="before")
    @classmethod
    def _bucket_of_a_host(cls, data: Any) -> Any:
        """Of s3://BUCKET.s3.REGION.amazonaws.com the bucket and the region."""
        url = data.get("url") if isinstance(data, dict) else None
        if not isinstance(url, str):
            return data
        scheme, colon, rest = unquoted(url).partition("://")
        login, at, rest = rest.rpartition("@")
        host, slash, path = rest.partition("/")
        match = _AMAZON.fullmatch(host)
        if match is None or colon == "" or scheme != "s3":
            return data
        if match["service"] != "s3":
            raise ValueError(
                f"{match['service']} hosts have no equivalent: name an ordinary bucket, s3://bucket"
            )
        bucket = match["bucket"]
        if not bucket:
            bucket, slash, path = path.partition("/")
        region = {"region": match["region"]} if match["region"] else {}
        return {**region, **data, "url": f"s3://{login}{at}{bucket}{slash}{path}"}

    @field_validator("url")
    @classmethod
    def _readable(cls, url: SecretUrl) -> SecretUrl:
        parse_url(url.get_secret_value())
        return url

    @model_validator(mode="after")
    def _fits_together(self) -> S3Options:
        url = parse_url(self.url.get_secret_value())
        if self.anonymous and url.key_id:
            raise ValueError("expected either credentials in url or anonymous")
        if self.tls != Tls() and (self.endpoint or "").startswith("http://"):
            raise ValueError("tls needs an endpoint that begins with https://")
        if not self.tls.check_hostname:
            raise ValueError(
                "check_hostname cannot be off for s3: name the host as its certificate"
            )
        if self.tls.key and not self.tls.cert:
            raise ValueError("tls.key needs a tls.cert")
        return self

    def identity(self) -> str:
        """The server, the bucket and the prefix, without who we are to them."""
        url = parse_url(self.url.get_secret_value())
        server = self.endpoint.rstrip("/") if self.endpoint else "s3:/"
        return f"{server}/{url.bucket}/{url.prefix}"

    @classmethod
    def from_lmcache(cls, url: str, extra: dict[str, Any]) -> dict[str, Any]:
        """Of s3://HOST, where its files, which have an `s3_region`, mean a bucket's host."""
        keys: dict[str, Any] = {}
        plain = str(extra.pop("disable_tls", False)).strip().lower() in _TRUE
        region = extra.pop("s3_region", None)
        if str(extra.pop("s3_enable_s3express", False)).strip().lower() in _TRUE:
            raise ValueError("s3_enable_s3express has no equivalent: name an ordinary bucket")
        login, at, host = url.partition("://")[2].rpartition("@")
        if region:
            keys["region"] = str(region)
            bucket, dot, server = host.rstrip("/").partition(".")
            if dot and not _AMAZON.fullmatch(host.rstrip("/")):
                keys["endpoint"] = f"{'http' if plain else 'https'}://{server}"
                keys["addressing"] = "virtual"
                host = bucket
        key_id, secret = extra.pop("aws_access_key_id", ""), extra.pop("aws_secret_access_key", "")
        if key_id and secret and not at:
            login, at = f"{quote(str(key_id), safe='')}:{quote(str(secret), safe='')}", "@"
        return {"url": f"s3://{login}{at}{host}", **keys}


class Url(NamedTuple):
    """What a url says."""

    bucket: str
    prefix: str
    key_id: str | None
    secret: str | None


def parse_url(text: str) -> Url:
    """Raises ValueError, which never quotes the url: it may hold a secret."""
    match = re.fullmatch(r"s3://(?:([^:@/]+):([^:@/]+)@)?([a-zA-Z0-9][\w.-]+)(/[\w.!()/-]*)?", text)
    if match is None:
        raise ValueError("expected s3://[key id:secret@]bucket[/prefix], with / in a secret as %2F")
    key_id, secret, bucket, path = match.groups()
    prefix = (path or "").strip("/") or "lmcache"
    return Url(bucket, prefix, key_id and unquote(key_id), secret and unquote(secret))
