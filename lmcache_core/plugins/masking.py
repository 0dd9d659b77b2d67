"""Masking: what may be a secret is hidden wherever text is shown to people.

Secrets get into the wrong place by mistake: a URL without its slashes, a password as the name of a
backend. So nothing is parsed here; what could be one is hidden, too much rather than too little.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

HIDDEN = "***"

_NAME = r"\w*(?:pass(?:wd|word|phrase)?|pwd|secret|token|credentials?|salt|apikey|(?<![a-z])key)"
_NAMED = re.compile(rf"^{_NAME}(?:_\w+)?$", re.IGNORECASE)
_SCHEME = r"[a-z][a-z0-9+.-]*:/+"
_USERINFO = re.compile(
    # redis://u:PW@h, memcached:u:PW@h, u:PW@h, also as url='...' in somebody's repr
    rf"(?<!\S)((?:\w+=)?[\"'(\[{{<]*(?:{_SCHEME})?)\S*@",
    re.IGNORECASE,
)
_BEFORE_AT = re.compile(rf"^(['\"](?:{_SCHEME})?).*@", re.IGNORECASE | re.DOTALL)
_PAIR = re.compile(
    # s3://KEY:SECRET, where what follows the colon is no port
    rf"({_SCHEME})[^\s:/@\[\"']+:(?!\d{{1,5}}(?![^\s/?#,;:.)\]}}\"']))[^\s\"']+",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    # password=PW, ?token=PW, 'secret': 'PW'
    rf"\b({_NAME}(?:_\w+)?(?:=|[\"']\s*[:=]\s*))(?:\"[^\"]*\"|'[^']*'|[^\s\"'&;,)}}\]]+)",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """`text` without what may be a secret: the part before an @, the second half of a pair in a
    URL, and what is assigned to a name such as `password`."""
    text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
    text = _PAIR.sub(rf"\1{HIDDEN}", text)
    return _ASSIGNED.sub(rf"\1{HIDDEN}", text)


def masked_value(name: str, value: object) -> str:
    """The repr of what `name` was given, for a message; all of it is hidden where `name` sounds
    like a secret's."""
    if names_secret(name):
        return f"{HIDDEN} (not shown)"
    if isinstance(value, Mapping):
        inside = (f"{key}: {masked_value(str(key), item)}" for key, item in value.items())
        return "{" + ", ".join(inside) + "}"
    if isinstance(value, str):
        # A password may hold blanks: it is one text, whatever stands in it.
        return masked(
            re.sub(rf"^(['\"](?:{_SCHEME})?).*@", rf"\1{HIDDEN}@", repr(value), flags=re.S)
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(masked_value("", item) for item in value) + "]"
    return masked(repr(value))


def names_secret(name: str) -> bool:
    """Whether a key of this name may hold a secret."""
    return _NAMED.match(name) is not None
