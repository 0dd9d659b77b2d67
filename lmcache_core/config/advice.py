"""Advice: what a config says that is possible, and hardly meant. Logged, with its place."""

from __future__ import annotations

from functools import partial

from lmcache_core.config.models import Config, TierConfig
from lmcache_core.config.positions import KeyPath
from lmcache_core.config.problems import Problems
from lmcache_core.io.threads import start_thread
from lmcache_core.plugins.log import LOG
from lmcache_core.plugins.options import Bounded

_SPEED = {"memory": 0, "disk": 1, "server": 1, "object store": 2}
_FOR_QUEUES = ("queue", "when_full")
_SECONDS = 0.5
"""The longest that a file system is waited for, which may hang."""


def advise(config: Config, problems: Problems) -> None:
    """Log what is odd about tiers that are each right. Takes half a second at most."""
    for number, tier in enumerate(config.tiers):
        path = ("tiers", number)
        slower = max(config.tiers[: number + 1], key=_slowness)
        if _slowness(slower) > _slowness(tier):
            _say(
                problems.where(path),
                f"{tier.name} ({tier.backend_class.medium}) stands behind {slower.name} "
                f"({slower.backend_class.medium}), and tiers are asked in order: the faster first",
            )
        for key in _FOR_QUEUES:
            if tier.backend_class.in_memory and key in tier.model_fields_set:
                where = problems.where((*path, key))
                _say(where, f"does nothing for {tier.name}: nothing waits to be written to memory")
    try:
        start_thread(partial(_compare_capacities, config, problems), "lmcache-advice").join(
            _SECONDS
        )
    except RuntimeError:  # no thread can be had
        return


def _compare_capacities(config: Config, problems: Problems) -> None:
    for number, tier in enumerate(config.tiers):
        if isinstance(tier.options, Bounded):
            _compare(tier, tier.options.capacity, ("tiers", number, "capacity"), problems)


def _compare(tier: TierConfig, capacity: int, path: KeyPath, problems: Problems) -> None:
    try:
        there = tier.options.medium_bytes()
    except Exception:  # a plugin's may be any; a file system's that cannot be asked is said at open
        return
    if there is not None and capacity > there:
        _say(
            problems.where(path),
            f"{capacity / 2**30:.1f} GiB, and the {tier.backend_class.medium} of {tier.name} has "
            f"{there / 2**30:.1f} GiB in all",
        )


def _slowness(tier: TierConfig) -> int:
    return _SPEED.get(tier.backend_class.medium, 1)


def _say(where: str, text: str) -> None:
    LOG.warn(f"{where}: {text}", f"{where}: {text}")
