"""What cannot be reused, and why."""

from __future__ import annotations


class NotCacheable(Exception):
    """Why a call runs without us."""


def described(error: Exception) -> str:
    """An error in words, whatever it is."""
    try:
        return repr(error)
    except Exception:
        return type(error).__name__
