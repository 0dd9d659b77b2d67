"""Weights: what a Namespace says of a model's weights, by their content.

A name tells one model from another, not from its next checkpoint. So a namespace takes a digest of
all bytes, or somebody's word that the name is enough, which it then shows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmcache_core.kv.content import combined_digest, tensor_digests
from lmcache_core.kv.tensors import byte_array

_STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""What safetensors call dtypes; tensors of others are read as their bytes."""


class Weights(BaseModel):
    """What a model's weights are: a digest of their content (`weights_digest`), or a name that
    somebody vouches for (`unverified`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    digest: str = Field(default="", pattern=r"^([0-9a-f]{32})?$")
    unverified: str = ""
    """The name, which other weights may have as well."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Weights:
        if bool(self.digest) == bool(self.unverified):
            raise ValueError("expected a digest, or a name that is unverified")
        return self

    def __str__(self) -> str:
        return self.digest or f"unverified: {self.unverified}"


def weights_digest(
    source: torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str],
) -> Weights:
    """The digest of all bytes of a model's weights: each one's name, dtype, shape and content.

    `source`: a module (its parameters and all its buffers), tensors by name, or a file of
    safetensors or a directory with some. Other weights have other digests, the same ones the same
    in every process; where they lie, how many files they are cut into and what they are called
    makes no difference. Read them once more where they may have changed. Raises NoContent for
    tensors without bytes, FileNotFoundError, ValueError for what is no safetensors.
    """
    if isinstance(source, torch.nn.Module):
        parts = (source.named_parameters, source.named_buffers)
        tensors = {name: each for part in parts for name, each in part(remove_duplicate=False)}
    elif isinstance(source, Mapping):
        tensors = dict(source)
    else:
        tensors = dict(_stored(Path(source)))
    digests = tensor_digests(tensors.values())
    return Weights(digest=combined_digest(dict(zip(tensors, digests, strict=True))).hex())


def unverified(name: str) -> Weights:
    """Your word that `name` stands for one set of weights and no other, ever: that of a checkpoint
    which is never overwritten, say. Nothing checks it, and every namespace shows it. Where it does
    not hold, KV of other weights is served."""
    return Weights(unverified=name)


def _stored(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of files of safetensors, mapped into memory."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {path}")
    for file in files:
        data = memoryview(np.memmap(file, np.uint8, mode="r"))  # type: ignore[arg-type]
        begin = 8 + int.from_bytes(data[:8], "little")
        try:
            head = json.loads(bytes(data[8:begin]) if begin <= len(data) else b"cut")
            for name, entry in head.items():
                if name != "__metadata__":
                    first, last = (begin + offset for offset in entry["data_offsets"])
                    if not begin <= first <= last <= len(data):
                        raise ValueError("cut")
                    yield name, _tensor(data[first:last], entry["dtype"], entry["shape"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{file}: not a file of safetensors ({error})") from error


def _tensor(data: memoryview, dtype: str, shape: list[int]) -> torch.Tensor:
    raw = torch.from_numpy(byte_array(data)) if data.nbytes else torch.empty(0, dtype=torch.uint8)
    if dtype not in _STORED:
        return raw
    aligned = raw.data_ptr() % 8 == 0
    return (raw if aligned else raw.clone()).view(_STORED[dtype]).view(shape)
