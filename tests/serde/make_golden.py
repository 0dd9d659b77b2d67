"""Write golden frames: python -m tests.serde.make_golden

One small frame for each serde and frame version, decoded by every later version. A file that is
there is never written again: what was stored once must stay readable.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lmcache_core import Chunk, KVLayout, LayerGroup, Namespace, unverified
from lmcache_core.backend import component
from lmcache_core.frames import frame as frames
from lmcache_core.frames.pipeline import Pipeline
from lmcache_core.kv.layout import DTYPES
from lmcache_core.kv.namespace import FRAME_VERSION

FOLDER = Path(__file__).parent / "golden"
os.environ["GOLDEN_KEY"] = "a5" * 32
PIPELINES: dict[str, list[tuple[str, dict[str, object]]]] = {
    "raw": [("raw", {})],
    "safetensors": [("safetensors", {})],
    "zstd": [("raw", {}), ("zstd", {})],
    "safetensors-zstd": [("safetensors", {}), ("zstd", {})],
    "byteplane": [("byteplane", {})],
    "byteplane-zstd": [("byteplane", {}), ("zstd", {})],
    "int8": [("int8", {"exact_tokens": 2})],
    "fp8": [("fp8", {"exact_layers": (1,)})],
    "int4": [("int4", {"group": 2}), ("safetensors", {})],
    "coded": [("coded", {"step": 0.1}), ("zstd", {})],
    "encrypt": [("zstd", {}), ("encrypt", {"key_env": "GOLDEN_KEY"})],
}
LOSSY = {"int8": 0.05, "fp8": 0.25, "int4": 0.25, "coded": 0.25}
"""How far off the numbers of a pipeline may be; 0 for the others."""
TOKENS = 5


def chunk() -> Chunk:
    """The chunk in every golden frame: numbers that need no random generator."""
    groups = (
        LayerGroup(
            kind="attention", layers=(0, 2), kv_heads=2, key_dim=4, value_dim=3, dtype="bfloat16"
        ),
        LayerGroup(
            kind="sliding",
            layers=(1,),
            kv_heads=1,
            key_dim=3,
            value_dim=3,
            dtype="float32",
            window=4,
        ),
    )
    namespace = Namespace(
        model="golden/模型",
        layout=KVLayout(groups=groups),
        weights=unverified("w"),
        rank=1,
        world=2,
    )
    tensors = {}
    for number, spec in enumerate(namespace.layout.tensors(TOKENS)):
        count = torch.Size(spec.shape).numel()
        values = (torch.arange(count) * 37 % 101 - 50) / (number + 8)
        tensors[spec.name] = values.view(spec.shape).to(DTYPES[spec.dtype])
    key = namespace.keys(range(TOKENS * 3), TOKENS)[2]
    return Chunk(key, namespace, 2, TOKENS, tensors)


def pipeline(serdes: list[tuple[str, dict[str, object]]]) -> Pipeline:
    classes = [(component("serdes", name), options) for name, options in serdes]
    return Pipeline([cls(cls.Options(**options)) for cls, options in classes])


def path(name: str, version: int = FRAME_VERSION) -> Path:
    """Where the frame of a pipeline lies."""
    return FOLDER / f"{name}.v{version}.frame"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, serdes in PIPELINES.items():
        if path(name).exists():
            print(f"{path(name).name} is there and stays")
            continue
        path(name).write_bytes(b"".join(frames.encode(chunk(), pipeline(serdes))))
        print(f"{path(name).name} written")


if __name__ == "__main__":
    main()
