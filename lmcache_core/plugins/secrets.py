"""Secrets: text as it may be shown in errors, logs and reprs, whatever was written by mistake.

A URL keeps its scheme, its servers and its path. What stands before an @, after a colon that no
port follows, and in a query is left out: `redis://user:word@host:6379/0` becomes
`redis://***@host:6379/0`, and `s3://KEY:WORD`, whose bucket was forgotten, `s3://KEY:***`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 80
"""Characters of a value that are shown."""
MASK = "***"
_NAMES_SECRET = re.compile(
    r"pass|secret|token|credential|salt|(^|[_.-])(key|auth)($|[_.-])", re.IGNORECASE
)
_URL = re.compile(
    r"""
    (?P<scheme> (?<![\w+.-]) [a-z][\w+.-]* :/{0,3})?    # also memcached:u:w@h and redis:/h
    (?P<login> [^\s'"<>]* @)
    (?P<rest> [^\s'"<>]*)
    | (?P<plain> (?<![\w+.-]) [a-z][\w+.-]* ://) (?P<open> [^\s'"<>]*)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_ASSIGNED = re.compile(
    r"""
    (?P<name> \b \w*? (?:pass\w*|pwd|secret|token|credentials?|salt|(?<![a-z])key) (?:_\w+)?)
    (?P<is> = | ["']\s*[:=]\s*)                   # password=w, 'password': 'w'
    (?: "[^"]*" | '[^']*' | [^\s"'&;,)}\]]+)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_SCHEME = re.compile(r"\s*[a-z][\w+.-]*:(?:/{1,3}|(?=\w+:))", re.IGNORECASE)
_AFTER_HOST = re.compile(
    r"""
    (?P<ipv6> \[ [0-9a-f:.%]* \])
    | :(?! \d{1,5} (?: [/,;:.)\]] | $ )) .+     # a colon that no port follows, and all behind it
    | [?#] .*
    """,
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_RANDOM = re.compile(r"(?=.*\d)(?=.*[a-z])(?!/)[\w+/=-]{24,}", re.IGNORECASE)
"""What a key or a token looks like: long, of letters and digits, no path."""


def masked(text: str) -> str:
    """`text` without what may be a secret: in URLs and their remains, and in what is assigned to a
    name such as `password`."""
    return _ASSIGNED.sub(rf"\g<name>\g<is>{MASK}", _URL.sub(_masked, text))


def shown(value: object, key: str = "", depth: int = 3) -> str:
    """A value that was found under `key`, for an error or a repr: short, and without secrets.

    What is nested deeper than `depth` is left out.
    """
    if names_secret(key):
        return f"{MASK} (not shown)"
    if isinstance(value, Mapping | list | tuple):
        return _short(_nested(value, depth - 1) if depth else "...")
    if isinstance(value, str):
        no_url = key.endswith("url") and "://" not in value and "@" not in value
        return f"{MASK} (no url)" if no_url and value.strip() else _short(repr(_text(value)))
    try:
        return _short(masked(repr(value)))
    except Exception:  # a number of thousands of digits, or a class of somebody's
        return f"a {type(value).__name__}"


def _nested(value: Mapping[Any, Any] | Sequence[Any], depth: int) -> str:
    if isinstance(value, Mapping):
        inner = (f"{_name(name)}: {shown(each, str(name), depth)}" for name, each in value.items())
        return "{" + ", ".join(inner) + "}"
    return "[" + ", ".join(shown(each, "", depth) for each in value) + "]"


def _name(key: object) -> str:
    return _text(key) if isinstance(key, str) else shown(key)


def shown_key(name: str) -> str:
    """A key, where a value may stand by mistake."""
    plain = len(name) <= LONGEST and re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", name)
    return name if plain else shown(name)


def names_secret(key: str) -> bool:
    """Whether what stands under a key of that name is a secret."""
    return bool(_NAMES_SECRET.search(key))


def _text(value: str) -> str:
    """A value as a whole: a password in it may hold blanks and quotes."""
    if _RANDOM.fullmatch(value):
        return MASK
    scheme = _SCHEME.match(value)
    if "@" in value:
        return f"{scheme[0] if scheme else ''}{MASK}@{_servers(value.rpartition('@')[2])}"
    if scheme:
        return scheme[0] + _servers(value[scheme.end() :])
    return value if " " in value else _servers(value)


def _masked(match: re.Match[str]) -> str:
    if match["login"] is not None:
        return f"{match['scheme'] or ''}{MASK}@{_servers(match['rest'])}"
    return match["plain"] + _servers(match["open"])


def _servers(text: str) -> str:
    """What follows a login: hosts with their ports, and a path."""
    return _AFTER_HOST.sub(lambda match: match["ipv6"] or match[0][0] + MASK, text)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
