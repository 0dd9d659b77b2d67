"""docs/metrics.md, made from the code: `python -m tests.core.plugins.metrics_page` writes it."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path

from lmcache_core.plugins.events import Event, Reason
from lmcache_core.plugins.metrics import METRICS, Metric

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"

_TEXT = """# Events and metrics

Made from `lmcache_core/plugins/` by `python -m tests.core.plugins.metrics_page`.

What happens in an engine is told as an event: a frozen dataclass. `CacheEngine.stats()` counts events, the Prometheus plugin does on `prometheus_client`'s default registry, and vLLM's connector does on vLLM's `/metrics`; each kind of trouble logs one line a minute at most.

A plugin hears every event, on a thread of its own:

```python
from lmcache_core.plugin import Event, Missed, hookimpl


@hookimpl
def lmcache_event(event: Event) -> None:
    if isinstance(event, Missed):
        print(f"{{len(event.keys)}} chunks of {{event.namespace.hex()}} missed: {{event.reason}}")
```

Installed as an entry point of the group `lmcache_core.plugins`, or handed to `lmcache_core.open(config, plugins=[...])`. A plugin that raises, hangs or ends its thread is named in the log and counted as `plugin_failed`; neither the engine nor other plugins feel it.

## Events

| event | fields | |
|---|---|---|
{events}

All chunks (`keys`) of an event are of one namespace, whose digest is `event.namespace`.

## Reasons

| `reason` | |
|---|---|
{reasons}

`absent` and `hole` are of no one tier: where a lookup found nothing, `tier` is empty.

## Metrics

In Prometheus a name begins with `lmcache_`, and a counter's ends with `_total`; seconds are histograms. In vLLM all are counters and begin with `vllm:lmcache_core_`. In `CacheEngine.stats()` the key is the name, without `_chunks`, and the labels' values: `("missed", "damaged", "disk")`.

| metric | labels | |
|---|---|---|
{metrics}

To be told when a store is bypassed: `lmcache_bypassed_total - lmcache_in_use_total > 0`.
"""


def page() -> str:
    """The text of docs/metrics.md."""
    kinds = dict.fromkeys(metric.event for metric in METRICS)
    return _TEXT.format(
        events="\n".join(map(_event, kinds)),
        reasons="\n".join(f"| {name} | {text} |" for name, text in _reasons()),
        metrics="\n".join(map(_metric, METRICS)),
    )


def _event(kind: type[Event]) -> str:
    names = ", ".join(f"`{field.name}`" for field in fields(kind))
    return f"| `{kind.__name__}` | {names} | {' '.join((kind.__doc__ or '').split())} |"


def _metric(metric: Metric) -> str:
    labels = ", ".join(metric.labels)
    return f"| `{metric.name}` | {labels} | {metric.help} |"


def _reasons() -> list[tuple[str, str]]:
    """Each reason and the text below it in the source."""
    (body,) = (n.body for n in ast.parse(inspect.getsource(Reason)).body if isinstance(n, ast.ClassDef))  # fmt: skip
    names = [Reason[n.targets[0].id].value for n in body if isinstance(n, ast.Assign)]  # type: ignore[attr-defined]
    texts = [n.value.value for n in body[1:] if isinstance(n, ast.Expr)]  # type: ignore[attr-defined]
    return list(zip(names, (" ".join(text.split()) for text in texts), strict=True))


if __name__ == "__main__":
    PAGE.write_text(page())
