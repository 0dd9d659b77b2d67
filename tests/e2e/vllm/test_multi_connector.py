"""Ours beside another connector, under vLLM's MultiConnector, with statistics on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.vllm.conftest import BLOCK, engine
from tests.e2e.vllm.test_connector import answers, prompt


def child(name: str, extra: dict[str, Any]) -> dict[str, Any]:
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_the_example_connector(llama: Path, tmp_path: Path, ours_first: bool) -> None:
    """Both store; the first in the config that has anything loads."""
    disk = {"backend": "disk", "path": str(tmp_path / "kv"), "capacity": "1GiB"}
    example = child("ExampleConnector", {"shared_storage_path": str(tmp_path / "example")})
    ours = child("LmcacheCoreConnector", {"chunk_size": BLOCK, "tiers": [disk]})
    both = [ours, example] if ours_first else [example, ours]
    options = {
        "kv_transfer_config": child("MultiConnector", {"connectors": both}),
        "disable_log_stats": False,
    }
    ids = prompt(300)
    with engine(llama, **options) as llm:
        ((cold, reused),) = answers(llm, ids)
        assert reused == 0
        assert list((tmp_path / "example").glob("*/*"))
    with engine(llama, **options) as llm:
        assert answers(llm, ids) == [(cold, 299 // BLOCK * BLOCK)]
        answers(llm, prompt(40, 1))  # what was counted comes with the next step
        counts = {metric.name: metric.value for metric in llm.get_metrics()
                  if metric.name.startswith("vllm:lmcache_core_hit_tokens")}  # fmt: skip
    assert sum(counts.values()) == (299 // BLOCK * BLOCK if ours_first else 0)
