"""The shared pool on the real model: what one process computed, a running one has at once."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lmcache_core
from lmcache_backends.shm import main as shm
from lmcache_connectors.transformers import attach
from tests.e2e.conftest import CHUNK, DOCUMENT, answer

pytestmark = pytest.mark.xdist_group("smollm2")

WORKER = Path(__file__).parent / "shm_worker.py"


@pytest.fixture
def pool() -> Iterator[str]:
    name = f"e2e-{secrets.token_hex(4)}"
    yield name
    shm(["clear", name])


def test_a_running_process_reuses_what_another_has_just_computed(
    smollm: tuple[Any, Any],
    prompts: list[torch.Tensor],
    answers: list[torch.Tensor],
    tmp_path: Path,
    pool: str,
) -> None:
    model, _ = smollm
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(prompts[1].tolist()))
    other = subprocess.Popen(
        [sys.executable, str(WORKER), pool, str(prompt)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "ready\n"
    tiers = [{"backend": "shm", "pool": pool, "capacity": "256MiB"}]
    with lmcache_core.open({"tiers": tiers, "chunk_size": CHUNK}) as cache, attach(model, cache):
        assert torch.equal(answer(model, prompts[0]), answers[0])
        out, _ = other.communicate("go\n", timeout=200)
    said = json.loads(out.splitlines()[-1])
    assert said["output"] == answers[1].tolist()
    assert said["loaded"] == {"shm": DOCUMENT // CHUNK}
    assert said["tensors"] == said["shared"] == 2 * said["loaded"]["shm"]
    assert said["buffers"] == 0
