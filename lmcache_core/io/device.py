"""The accelerator's side of host memory: pinning, streams, tensors on their way."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from lmcache_core.errors import ConfigError
from lmcache_core.io.memory import HOST


def host_register(pages: np.ndarray) -> None:
    """Register memory that was mapped elsewhere as pinned, until `pages` is gone.

    Raises ConfigError where the driver refuses. Without CUDA there is nothing to do.
    """
    if not torch.cuda.is_available():
        return
    cuda = torch.cuda.cudart()
    code = int(cuda.cudaHostRegister(pages.ctypes.data, pages.nbytes, 0))
    if code:
        raise ConfigError(
            f"{pages.nbytes} bytes of host memory cannot be pinned: CUDA error {code}"
        )
    weakref.finalize(pages, cuda.cudaHostUnregister, pages.ctypes.data).atexit = False


def pooled_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor for KV on its way into an engine; on the host, of the pool."""
    if device.type != "cpu":
        return torch.empty(*shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(*shape, dtype=dtype)
    return torch.frombuffer(HOST.allocate(nbytes), dtype=dtype).view(*shape)


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """What this thread has asked of an accelerator so far, for `side_stream` to wait for."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextmanager
def side_stream(device: torch.device, after: torch.cuda.Event | None = None) -> Iterator[None]:
    """Copy to and from `device` beside what else runs there; at the end the copies are done.

    They begin after the `record_event` that is given. On the host this is nothing.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    if after is not None:
        stream.wait_event(after)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in host memory, contiguous; the tensor itself where it already is."""
    if tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad:
        return tensor
    return tensor.detach().to("cpu").contiguous()
