"""A node that serves the model: python node.py

Says "ready" when the model is loaded. For each line, the JSON of a config and a prompt, it opens a
cache, answers the prompt, and prints as JSON what it generated, the seconds to the first token, and
how many chunks came from where.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import smollm2

import lmcache_core
from lmcache_connectors.transformers import attach

SETTINGS = {"do_sample": False, "pad_token_id": 2}


def main() -> None:
    model, _ = smollm2.load(torch.float32)
    model.generate(torch.arange(40)[None], max_new_tokens=2, **SETTINGS)  # first calls are slow
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(model, *json.loads(line))), flush=True)


def answer(model: Any, config: dict[str, Any], prompt: list[list[int]]) -> dict[str, Any]:
    """What a node says to it."""
    ids = torch.tensor(prompt)
    with lmcache_core.open(config) as cache, attach(model, cache):
        began = time.monotonic()
        model.generate(ids, max_new_tokens=1, **SETTINGS)
        ttft = time.monotonic() - began
        output = model.generate(ids, max_new_tokens=16, **SETTINGS)
        cache.flush()
        loaded = {event[1]: n for event, n in cache.stats().items() if event[0] == "loaded"}
    return {"output": output.tolist(), "ttft": ttft, "loaded": loaded}


if __name__ == "__main__":
    main()
