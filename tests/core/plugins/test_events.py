"""Events are types: each is counted, and a misspelt one is found before anything runs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from lmcache_core.errors import FrameReason
from lmcache_core.kv.keys import ChunkKey
from lmcache_core.plugins import events
from lmcache_core.plugins.counters import Counters
from lmcache_core.plugins.events import ChunkEvent, Event, Missed, Reason, by_namespace
from lmcache_core.plugins.metrics import METRICS, label_values
from tests.core.plugins.metrics_page import PAGE, page

ROOT = Path(__file__).parents[3]
KINDS = [
    kind
    for kind in vars(events).values()
    if isinstance(kind, type) and issubclass(kind, Event) and kind not in (Event, ChunkEvent)
]
A, B = (ChunkKey(bytes([i]) * 32) for i in (1, 2))


def example(kind: type[Event]) -> Event:
    values: dict[str, Any] = {"keys": (A, A), "reason": Reason.HOLE, "found": 1, "chunks": 2}
    values |= {"nbytes": 4096, "seconds": 0.25}
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: values.get(name, name) for name in fields})


@pytest.mark.parametrize("kind", KINDS)
def test_each_event_is_counted_with_its_labels(kind: type[Event]) -> None:
    counters = Counters()
    counters.add(example(kind))
    counters.add(example(kind))
    mine = {each.counted_as: each for each in METRICS if each.event is kind}
    counted = counters.snapshot()
    assert {name for name, *_ in counted} == set(mine)
    for (name, *labels), n in counted.items():
        assert tuple(labels) == label_values(example(kind))
        assert n == 2 * mine[name].amount(example(kind)) > 0


def test_names_of_metrics_are_told_apart() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert {metric.event for metric in METRICS} == set(KINDS)


def test_events_say_whose_chunks_they_are_of() -> None:
    assert Missed(tier="", keys=(A, A), reason=Reason.HOLE).namespace == A.namespace
    assert list(by_namespace([B, A, B])) == [(A,), (B, B)]


def test_each_reason_of_a_frame_is_a_reason() -> None:
    assert {Reason(each).value for each in get_args(FrameReason)} == set(get_args(FrameReason))


RIGHT = """
from lmcache_core.errors import FrameError
from lmcache_core.plugins.events import Bypassed, Missed, Reason
from lmcache_core.plugins.observers import Observers

def tell(observers: Observers) -> None:
    observers.tell(Missed(tier="disk", keys=(), reason=Reason.ABSENT))
    observers.tell(Bypassed(tier="disk", path="reads", cause="slow"))
    raise FrameError("cut", "damaged")
"""


def test_a_misspelt_event_or_reason_does_not_type_check(tmp_path: Path) -> None:
    misspelt = {
        "Missed(": "Mised(",
        "reason=": "reasons=",
        "Reason.ABSENT": "Reason.ABSNT",
        "reason=Reason.ABSENT": 'reason="absent"',
        '"reads"': '"reeds"',
        '"damaged"': '"damagd"',
        'tell(Bypassed(tier="disk", path="reads", cause="slow"))': 'tell("bypassed")',
    }
    (tmp_path / "right.py").write_text(RIGHT)
    for number, (right, wrong) in enumerate(misspelt.items()):
        assert right in RIGHT
        body = RIGHT.replace("import Bypassed, Missed, Reason", "import Bypassed, Missed, Reason ")
        body = body.split("def tell")[0] + "def tell" + body.split("def tell")[1].replace(right, wrong)  # fmt: skip
        (tmp_path / f"wrong{number}.py").write_text(body)
    files = sorted(tmp_path.glob("*.py"))
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--strict", "--follow-imports=silent",
         "--ignore-missing-imports", "--scripts-are-modules", *map(str, files)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    with_errors = {Path(line.split(":")[0]).name for line in found.stdout.splitlines() if "error:" in line}  # fmt: skip
    assert with_errors == {f"wrong{number}.py" for number in range(len(misspelt))}, found.stdout


def test_the_page_of_events_and_metrics_is_current() -> None:
    assert PAGE.read_text() == page()
