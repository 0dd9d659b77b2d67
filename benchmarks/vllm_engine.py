"""A vLLM engine that does what its standard input says, and ends with it. For bench_vllm.py.

    python vllm_engine.py '{"model": ..., ...}'        LLM's arguments

Each line in and out is JSON:

    [[token ids], ...]   send these prompts at once, one token each ->
                         [[seconds to its token, prompt tokens not computed], ...]
    "flush"              until the connector has written all that it promised -> null
    "reset"              forget vLLM's own prefix cache -> null
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams

ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
names = map(str, itertools.count())


def answer(llm: LLM, prompts: list[list[int]]) -> list[tuple[float, int]]:
    """What `LLM.generate` does, with a look at the clock when each token arrives."""
    engine = llm.llm_engine
    order = [next(names) for _ in prompts]
    got: dict[str, tuple[float, int]] = {}
    began = time.perf_counter()
    for name, ids in zip(order, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": ids}, ONE_TOKEN)
    while engine.has_unfinished_requests():
        for out in engine.step():
            got[out.request_id] = time.perf_counter() - began, out.num_cached_tokens
    return [got[name] for name in order]


def flush(worker: Any) -> None:
    """Runs in vLLM's worker process. vLLM's own connector has written when its step ends."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    ours = getattr(get_kv_transfer_group(), "_worker", None)
    if ours is not None and not ours.flush(60):
        raise RuntimeError("not everything was stored within a minute")


def main() -> None:
    """Answer until there is no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints goes with its log
    llm = LLM(**json.loads(sys.argv[1]))
    answers.write("null\n")
    for line in sys.stdin:
        asked = json.loads(line)
        if asked == "flush":
            llm.collective_rpc(flush)
        elif asked == "reset" and not llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        answers.write(json.dumps(None if isinstance(asked, str) else answer(llm, asked)) + "\n")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
