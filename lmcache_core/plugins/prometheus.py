"""The Prometheus exporter: a plugin like any other, on prometheus_client's default registry."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

from lmcache_core.plugins.events import Event
from lmcache_core.plugins.hooks import hookimpl
from lmcache_core.plugins.metrics import METRICS, Metric, label_values

BUCKETS = tuple(digit * 10.0**power for power in range(-5, 2) for digit in (1, 2.5, 5))
"""Seconds: from a lookup in memory to a prompt from a store far away."""


def _exported(metric: Metric) -> Counter | Histogram:
    name = f"lmcache_{metric.name}"
    if metric.in_seconds:
        return Histogram(name, metric.help, metric.labels, buckets=BUCKETS)
    return Counter(name, metric.help, metric.labels)


_EXPORTED = [(metric, _exported(metric)) for metric in METRICS]


@hookimpl
def lmcache_event(event: Event) -> None:
    """Count an event."""
    values = label_values(event)
    for metric, exported in _EXPORTED:
        if isinstance(event, metric.event):
            one, amount = exported.labels(*values), metric.amount(event)
            one.observe(amount) if isinstance(one, Histogram) else one.inc(amount)
