"""What an operator sees: counts on vLLM's /metrics and in its log line.

A count travels as "name|label|label": number, from either side, through vLLM, to the front end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from lmcache_core.plugin import METRICS


class _Metric(NamedTuple):
    name: str
    help: str
    labels: tuple[str, ...] = ()


_OWN = (
    _Metric("hit_tokens", "Tokens of prompts that are loaded", ("tier",)),
    _Metric("loads", "Loads of requests' prefixes"),
    _Metric("failed_loads", "Loads that brought less than the lookup promised"),
    _Metric("load_seconds", "Time that loads took, one request's after the other"),
    _Metric("store_seconds", "Time until new blocks were handed over"),
    _Metric("stores_skipped", "New blocks that found no room on their way"),
)
"""What the connector counts itself."""

_METRICS = {own.name: own for own in _OWN} | {
    metric.counted_as: _Metric(metric.name, metric.help, metric.labels) for metric in METRICS
}


@dataclass
class Stats(KVConnectorStats):
    """Counts since the last step. `data`: "name|label|label" to number."""

    def reset(self) -> None:
        self.data: dict[str, float] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, number in other.data.items():
            self.data[name] = self.data.get(name, 0) + number
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name.replace("|", " "): round(n, 3) for name, n in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data


class Metrics(KVConnectorPromMetrics):
    """vllm:lmcache_core_*, with vLLM's labels and ours."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counters = {
            (key, len(metric.labels)): self._counter_cls(
                name=f"vllm:lmcache_core_{metric.name}",
                documentation=metric.help,
                labelnames=[*self._labelnames, *metric.labels],
            )
            for key, metric in _METRICS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values = self.per_engine_labelvalues[engine_idx]
        for count, number in transfer_stats_data.items():
            name, *labels = count.split("|")
            counter = self._counters.get((name, len(labels)))
            if counter and number > 0:
                counter.labels(*values, *labels).inc(number)
