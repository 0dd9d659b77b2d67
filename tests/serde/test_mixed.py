"""A config that changes over time: every frame says how it was made, so all of them are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import lmcache_core
from lmcache_core import Namespace, Tensors, unverified
from lmcache_core.testing import random_tensors, tiny_layout

TOKENS = 16
PIPELINES: list[Any] = [
    [],
    ["zstd"],
    ["byteplane", "zstd"],
    ["safetensors", {"zstd": {"level": 9}}],
    ["int8"],
    [{"int4": {"group": 8, "exact_layers": [1]}}, "safetensors", "zstd"],
    [{"coded": {"step": 0.2}}, "zstd"],
    ["fp8"],
]


def test_frames_of_many_pipelines_live_in_one_store(tmp_path: Path) -> None:
    layout = tiny_layout()
    namespace = Namespace(model="m", layout=layout, weights=unverified("test"))
    sequences = [namespace.keys([n, *range(1, 5 * TOKENS)], TOKENS) for n in range(len(PIPELINES))]

    def config(pipeline: Any) -> dict[str, Any]:
        tier = {"backend": "disk", "path": str(tmp_path), "capacity": "64MiB", "serde": pipeline}
        return {"chunk_size": TOKENS, "tiers": [tier]}

    for number, (pipeline, keys) in enumerate(zip(PIPELINES, sequences, strict=True)):
        with lmcache_core.open(config(pipeline)) as cache:

            def gather(index: int, out: Tensors, number: int = number) -> None:
                for name, tensor in random_tensors(layout, TOKENS, 100 * number + index).items():
                    out[name].copy_(tensor)

            assert cache.store(namespace, keys, gather) == 5
    for pipeline in PIPELINES:
        with lmcache_core.open(config(pipeline)) as cache:
            for number, keys in enumerate(sequences):
                chunks = list(cache.load(keys))
                assert [chunk.index for chunk in chunks] == [0, 1, 2, 3, 4]
                for chunk in chunks:
                    expected = random_tensors(layout, TOKENS, 100 * number + chunk.index)
                    for name, tensor in expected.items():
                        error = (chunk.tensors[name].float() - tensor.float()).abs().max()
                        assert float(error) <= (0.0 if number < 4 else 0.5)
                        assert torch.isfinite(chunk.tensors[name].float()).all()
