"""Identity: what a model computes, observed anew at every call.

A walk says what hangs on the model; it is spared while its guards hold. The bytes of all tensors
are read every time. Two equal identities compute the same KV from the same tokens.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lmcache_connectors.transformers.refusal import NotCacheable
from lmcache_connectors.transformers.walk import Walk
from lmcache_core.connector import freed_in_children, tensor_digests
from lmcache_core.errors import NoContent

_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")
"""Kernels of attention that torch may choose of."""


class Identity(NamedTuple):
    """Digests of what a model computes."""

    whole: bytes
    frame: bytes
    """Without parameters' bytes: all that may decide what KV looks like, and whether a token's
    stands for its prefix. With devices, which the whole does not know by number."""


class Observer:
    """Observes a model. Threads may share it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._walk: Walk | None = None
        self._lock = freed_in_children(threading.Lock())

    def __repr__(self) -> str:
        return f"Observer({self._walk})"

    def identity(self) -> Identity:
        """What the model computes now. Raises NotCacheable where that cannot be known."""
        walk = self._current_walk()
        if walk.refusals:
            raise NotCacheable(walk.refusals[0])
        world = _world(self._model)
        try:
            digests = tensor_digests(walk.tensors)
        except NoContent as error:
            raise NotCacheable(str(error)) from error
        whole, frame = xxhash.xxh3_128(walk.digest + world), xxhash.xxh3_128(walk.digest + world)
        for tensor, digest in zip(walk.tensors, digests, strict=True):
            part = tensor.device.type.encode() + digest
            whole.update(part)
            if isinstance(tensor, torch.nn.Parameter):
                part = _form(tensor.device, tensor.dtype, tensor.shape)
            frame.update(part)
        for buffer in walk.buffers:
            digest = xxhash.xxh3_128_digest(np.ascontiguousarray(buffer).view(np.uint8).data)
            whole.update(digest)
            frame.update(digest)
        return Identity(whole.digest(), frame.digest())

    def _current_walk(self) -> Walk:
        with self._lock:
            walk = self._walk
            if walk is None or not walk.guards.hold() or not _holds(walk.environment):
                self._walk = None  # should this one fail
                self._walk = walk = Walk(self._model)
            return walk


def _holds(environment: dict[str, str | None]) -> bool:
    return all(os.environ.get(name) == value for name, value in environment.items())


@functools.lru_cache(maxsize=1024)
def _form(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> bytes:
    return f"{device} {dtype} {list(shape)}".encode()


def _world(model: torch.nn.Module) -> bytes:
    """What torch computes by just now, for all models. Raises NotCacheable where it is changed."""
    device = next((tensor.device.type for tensor in model.parameters()), "cpu")
    if device != "meta" and torch.is_autocast_enabled(device):
        raise NotCacheable("autocast")
    modules: Any = torch.nn.modules.module
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        raise NotCacheable("a global forward hook, which may want to see the whole prompt")
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    if any(type(mode) is not DeviceContext for mode in modes):  # that says where, and not what
        raise NotCacheable("a mode that changes what torch computes")
    kernels = [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in _ATTENTION]
    precision = torch.get_float32_matmul_precision()
    return f"{torch.get_default_dtype()} {precision} {kernels}".encode()


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether PEFT has been at the model: its adapters are nothing that another engine knows."""
    return getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config")
