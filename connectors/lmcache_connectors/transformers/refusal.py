"""What cannot be reused, and why."""

from __future__ import annotations


class NotCacheable(Exception):
    """Why a call runs without us."""
