"""Options: base of what a component takes from the config."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Base of every component's options: unknown keys and wrong types are config errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
