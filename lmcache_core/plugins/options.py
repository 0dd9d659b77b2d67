"""Options: base of what a component takes from the config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from lmcache_core.plugins.secrets import shown


class Options(BaseModel):
    """Base of every component's options: unknown keys and wrong types are config errors.

    Neither an error nor a repr shows what may be a secret, be it a plain text field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    def identity(self) -> str | None:
        """What the store is, however it is spelt: two tiers of equal identity would be one store,
        which is refused. None: each is a store of its own."""
        return None

    def medium_bytes(self) -> int | None:
        """Bytes that the medium has in all, used or not; None where nobody can say. A larger
        `capacity` is warned of."""
        return None

    def made(self) -> bool:
        """Whether the store is there already; false where opening it would make it, such as a
        directory or a pool. Tools that only look then leave it alone."""
        return True

    def bytes_for(self, frame: int) -> int:
        """Bytes of `capacity` that a frame of so many bytes takes."""
        return frame

    @classmethod
    def from_lmcache(cls, url: str, extra: dict[str, Any]) -> dict[str, Any]:
        """The keys here for LMCache's `remote_url` of one of the backend's schemes.

        Takes out of `extra`, LMCache's `extra_config`, what it understands. Raises ValueError,
        with how to write it here, for what has no equivalent.
        """
        return {"url": url}

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, _Shown(value, name or "")


@runtime_checkable
class Bounded(Protocol):
    """Options of a store that holds no more than so many bytes."""

    capacity: int


class _Shown:
    """A value in a repr."""

    def __init__(self, value: object, key: str) -> None:
        self._value, self._key = value, key

    def __repr__(self) -> str:
        value = self._value
        plain = value is None or isinstance(value, str | list | tuple | dict)
        return shown(value, self._key) if plain and value else repr(value)
