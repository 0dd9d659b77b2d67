"""A node that serves the model: python node.py CONFIG.json PROMPT.json

Says "ready" when the model is loaded, waits for a line, answers the prompt, and prints as JSON what
it generated, the seconds to the first token, and how many chunks came from where.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import smollm2

import lmcache_core
from lmcache_connectors.transformers import attach


def main() -> None:
    config, prompt = (json.loads(Path(path).read_text()) for path in sys.argv[1:])
    model, _ = smollm2.load(torch.float32)
    ids = torch.tensor(prompt)
    settings = {"do_sample": False, "pad_token_id": 2}
    model.generate(ids[:, :40], max_new_tokens=2, **settings)  # first calls are slow
    with lmcache_core.open(config) as cache, attach(model, cache):
        print("ready", flush=True)
        sys.stdin.readline()
        began = time.monotonic()
        model.generate(ids, max_new_tokens=1, **settings)
        ttft = time.monotonic() - began
        output = model.generate(ids, max_new_tokens=16, **settings)
        cache.flush()
        loaded = {event[1]: n for event, n in cache.stats().items() if event[0] == "loaded"}
    print(json.dumps({"output": output.tolist(), "ttft": ttft, "loaded": loaded}))


if __name__ == "__main__":
    main()
