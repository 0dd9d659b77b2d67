"""The exception tree.

LmcacheError
├── ConfigError            cannot be used; names file, line, key and what was expected
│   └── UnknownComponent   no backend, serde, ... of that name; lists the known ones
├── LayoutError            tensors do not fit the KVLayout: a programming error, raised at once
├── NoContent              a tensor has no bytes that can be read, so that nobody knows it
├── FrameError             not the frame asked for; `.reason` is the counted miss reason
└── StorageError           a backend could not do what it was asked; never reaches an engine
    ├── DeadlineExceeded   ... in time
    └── Refused            ... because its store says no: trying again does not help
"""

from __future__ import annotations

from typing import Literal

FrameReason = Literal["damaged", "foreign", "unreadable"]
"""damaged: not a whole frame: cut, extended, changed. foreign: whole, but another key's.
unreadable: of another version, or of a serde that is not installed."""


class LmcacheError(Exception):
    """Base of every exception that this project raises."""


class ConfigError(LmcacheError):
    """The configuration cannot be used."""


class UnknownComponent(ConfigError):
    """No component of that name is installed."""


class LayoutError(LmcacheError, ValueError):
    """A tensor's shape, dtype or device does not fit what the KVLayout says."""


class NoContent(LmcacheError):
    """A tensor without bytes that can be read: meta, fake, or of a layout that nobody knows."""


class FrameError(LmcacheError):
    """Bytes that are not the frame that was asked for: a miss, never data."""

    def __init__(self, message: str, reason: FrameReason = "damaged") -> None:
        super().__init__(message)
        self.reason = reason


class StorageError(LmcacheError):
    """A backend failed. The tier turns it into a miss or a counted drop."""


class DeadlineExceeded(StorageError, TimeoutError):
    """A backend did not answer within its deadline."""


class Refused(StorageError):
    """The store, or its certificate, says no, and will again: the configuration is wrong."""
