"""A chunk's tensors as bytes, and bytes as tensors, without copying."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lmcache_core.errors import LayoutError
from lmcache_core.io.buffers import Buffers, concat
from lmcache_core.kv.filling import written
from lmcache_core.kv.layout import DTYPES, TensorSpec


def copy_exact(out: torch.Tensor, source: torch.Tensor) -> None:
    """Copy `source` (any device, any strides) into `out`; never convert or broadcast. What a gather
    fills in this way is known to be filled.

    Raises LayoutError where shape or dtype differ, which `out.copy_` would pass over.
    """
    if source.shape != out.shape or source.dtype != out.dtype:
        raise LayoutError(
            f"expected {out.dtype} {list(out.shape)}; got {source.dtype} {list(source.shape)}"
        )
    out.copy_(source.detach())
    written(out)


def views(parts: Buffers, specs: Iterable[TensorSpec]) -> dict[str, torch.Tensor]:
    """Tensors that lie one behind the other in `parts`, with no copy of those that lie whole in
    one of them, aligned.

    They keep their parts alive. Raises LayoutError when the parts have another size.
    """
    specs = tuple(specs)
    if len(parts) == 1:
        return _views(parts[0], specs)
    tensors: dict[str, torch.Tensor] = {}
    for buffer, run in _runs(parts, specs):
        tensors |= _views(buffer, run)
    return tensors


def _runs(
    parts: Buffers, specs: tuple[TensorSpec, ...]
) -> Iterator[tuple[memoryview, tuple[TensorSpec, ...]]]:
    """Both, cut where a part and a tensor end at the same place."""
    rest = iter(parts)
    buffers: list[memoryview] = []
    run: list[TensorSpec] = []
    short = 0
    for spec in specs:
        run.append(spec)
        short += spec.nbytes
        while short > 0 and (part := next(rest, None)) is not None:
            buffers.append(part)
            short -= part.nbytes
        if short == 0:
            yield concat(buffers), tuple(run)
            buffers, run = [], []
    yield concat([*buffers, *rest]), tuple(run)  # nothing, where the sizes are the same


def _views(buffer: memoryview, specs: tuple[TensorSpec, ...]) -> dict[str, torch.Tensor]:
    needed, plan = _plan(specs)
    if buffer.nbytes != needed:
        raise LayoutError(f"the tensors take {needed} bytes; the buffer has {buffer.nbytes}")
    if not needed:
        return {name: torch.empty(shape, dtype=dtype) for name, dtype, shape, *_ in plan}
    whole = torch.from_numpy(byte_array(buffer))  # one for all: `byte_view` sees neighbours
    place = whole.data_ptr()
    typed: dict[torch.dtype, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, dtype, shape, strides, offset in plan:
        if offset % dtype.itemsize or place % dtype.itemsize:  # torch wants its elements aligned
            part = whole[offset : offset + math.prod(shape) * dtype.itemsize].clone()
            tensors[name] = part.view(dtype).view(shape)
            continue
        if dtype not in typed:
            typed[dtype] = whole[: needed - needed % dtype.itemsize].view(dtype)
        tensors[name] = typed[dtype].as_strided(shape, strides, offset // dtype.itemsize)
    return tensors


_Placed = tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], int]
"""Name, dtype, shape, strides in elements, offset in bytes."""


@lru_cache(maxsize=256)
def _plan(specs: tuple[TensorSpec, ...]) -> tuple[int, tuple[_Placed, ...]]:
    """Bytes in all, and where each tensor lies."""
    plan: list[_Placed] = []
    offset = 0
    for spec in specs:
        strides = tuple(math.prod(spec.shape[n + 1 :]) for n in range(len(spec.shape)))
        plan.append((spec.name, DTYPES[spec.dtype], spec.shape, strides, offset))
        offset += spec.nbytes
    return offset, tuple(plan)


def byte_array(buffer: memoryview) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A buffer as torch and compiled loops take it even where it is read-only (a client library's
    `bytes`), as a chunk's tensors are by contract."""
    return np.asarray(_Memory(buffer)) if buffer.readonly else np.frombuffer(buffer, np.uint8)


class _Memory:
    """A read-only buffer that numpy takes for a writable one."""

    def __init__(self, buffer: memoryview) -> None:
        interface = np.frombuffer(buffer, np.uint8).__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self._keep = buffer


def byte_view(tensors: Iterable[torch.Tensor]) -> list[memoryview]:
    """The bytes of contiguous host tensors, in order; neighbours in memory become one buffer."""
    runs: list[list[torch.Tensor]] = []
    end: tuple[int, int] | None = None
    for tensor in tensors:
        if tensor.nbytes == 0:
            continue
        here = (tensor.untyped_storage().data_ptr(), tensor.data_ptr())
        if here == end:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
        end = (here[0], here[1] + tensor.nbytes)
    return [_run_bytes(run) for run in runs]


def _run_bytes(run: list[torch.Tensor]) -> memoryview:
    first = run[0]
    if not all(tensor.is_contiguous() for tensor in run):
        raise LayoutError("tensors to store must be contiguous")
    length = sum(tensor.nbytes for tensor in run)
    # Beyond the first tensor's end lie its neighbours, in the same storage.
    return first.view(-1).view(torch.uint8).as_strided((length,), (1,)).numpy().data
