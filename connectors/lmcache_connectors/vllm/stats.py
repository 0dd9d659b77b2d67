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


class _Metric(NamedTuple):
    name: str
    help: str
    labels: tuple[str, ...] = ()


_METRICS = {
    "hit_tokens": _Metric("hit_tokens", "Tokens of prompts that are loaded", ("tier",)),
    "loads": _Metric("loads", "Loads of requests' prefixes"),
    "failed_loads": _Metric("failed_loads", "Loads that brought less than the lookup promised"),
    "load_seconds": _Metric("load_seconds", "Time that loads took, one request's after the other"),
    "store_seconds": _Metric("store_seconds", "Time until new blocks were handed over"),
    "stores_skipped": _Metric("stores_skipped", "New blocks that found no room on their way"),
    "stored": _Metric("stored_chunks", "Chunks stored", ("tier",)),
    "stored_bytes": _Metric("stored_bytes", "Bytes of KV stored", ("tier",)),
    "loaded": _Metric("loaded_chunks", "Chunks loaded", ("tier",)),
    "loaded_bytes": _Metric("loaded_bytes", "Bytes of KV loaded", ("tier",)),
    "missed": _Metric("missed_chunks", "Chunks wanted and not had", ("reason", "tier")),
    "dropped": _Metric("dropped_chunks", "Chunks not stored", ("reason", "tier")),
    "evicted": _Metric("evicted_chunks", "Chunks removed to make room", ("tier",)),
    "tier_open": _Metric(
        "tier_bypassed", "Times that a tier began to be bypassed", ("path", "tier")
    ),
    "tier_closed": _Metric("tier_back", "Times that a tier came back", ("path", "tier")),
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
            key: self._counter_cls(
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
            if name in self._counters and number > 0:
                self._counters[name].labels(*values, *labels).inc(number)
