"""Another process that asks about the document: python worker.py CACHE PROMPT.json

Prints what it generated and how many chunks came from where, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import smollm2

import lmcache_core
from lmcache_connectors.transformers import attach


def main() -> None:
    folder, prompt = sys.argv[1:]
    model, _ = smollm2.load(torch.float32)
    ids = torch.tensor(json.loads(Path(prompt).read_text()))
    tiers = [
        {"backend": "local_cpu", "capacity": "1GiB"},
        {"backend": "disk", "path": folder, "capacity": "1GiB"},
    ]
    with lmcache_core.open({"tiers": tiers, "chunk_size": 32}) as cache, attach(model, cache):
        print("ready", flush=True)
        output = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=2)
        loaded = {event[1]: n for event, n in cache.stats().items() if event[0] == "loaded"}
    print(json.dumps({"output": output.tolist(), "loaded": loaded}))


if __name__ == "__main__":
    main()
