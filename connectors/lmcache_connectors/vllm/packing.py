"""How keys and values lie in a block of vLLM's memory, and the way to a form that is no engine's
own and back.

A block of all layers of a KV cache group is `x`, [layers, kv_heads, tokens, key_dim + value_dim];
what a page (one layer's and head's part) holds is up to the attention backend:

    split    each token's key and value side by side, as the shape says (and MLA's one vector)
    columns  all keys, transposed to [dim, tokens], then all values as [tokens, dim]
    tiles    both in tiles of 16 x 16 pairs, as AMX multiplies them

vLLM's CPU backend chooses by instruction set and says nowhere what that means. So it is tried:
random keys and values go through its own writing op, and a packing is known only where it finds
them again, bit for bit. Another vLLM or an instruction set never seen here can make a packing
unknown, but not wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lmcache_core import copy_exact

Views = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None], list[tuple[torch.Tensor, torch.Tensor]]
]
"""Of (x, keys, values): pairs of views, vLLM's and ours, whose elements are the same in order."""

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""vLLM's writing op: (keys and values, both [tokens, kv_heads, dim]; blocks [blocks, kv_heads,
block_size, 2 * dim]; slots [tokens], int64)."""


class Packing(NamedTuple):
    """One way to lay out a block. Copies are strided, with nothing allocated in between."""

    name: str
    views: Views

    def unpack(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> None:
        """Copy block `x` into `k` and `v`, both [layers, kv_heads, tokens, dim]; no `v`: MLA.

        `x` may lie strided in vLLM's memory; `k` and `v` are contiguous. Raises LayoutError or
        RuntimeError where the shapes or strides cannot be this packing's.
        """
        for theirs, ours in self.views(x, k, v):
            copy_exact(ours, theirs)

    def pack(self, k: torch.Tensor, v: torch.Tensor | None, x: torch.Tensor) -> None:
        """The inverse: copy `k` and `v` into block `x`, in place."""
        for theirs, ours in self.views(x, k, v):
            copy_exact(theirs, ours)


def _split(
    x: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if v is None:
        return [(x, k)]
    keys, values = x.split([k.shape[-1], v.shape[-1]], dim=-1)
    return [(keys, k), (values, v)]


def _columns(
    x: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    assert v is not None
    tokens, dim = k.shape[2:]
    keys, values = _halves(x)
    return [(keys.unflatten(2, (dim, tokens)).mT, k), (values.unflatten(2, (tokens, dim)), v)]


def _tiles(
    x: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A key's neighbours in its dim are a pair, a value's in its tokens. 2-byte dtypes only."""
    assert v is not None
    tokens, dim = k.shape[2:]
    keys, values = _halves(x)
    # A key's pairs stay together, so that they move as one int32.
    pairs = keys.view(torch.int32).unflatten(2, (tokens // 16, dim // 2, 16)).mT
    found = [(pairs, k.view(torch.int32).unflatten(2, (tokens // 16, 16)))]
    theirs = values.unflatten(2, (dim // 16, tokens // 2, 16, 2)).transpose(2, 3)
    ours = v.unflatten(3, (dim // 16, 16)).unflatten(2, (tokens // 2, 2))
    # Every other token at a time: runs of 16 elements to copy, not of 2.
    return [*found, *((theirs[..., i], ours[:, :, :, i]) for i in range(2))]


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The first and the second half of each page, both [layers, kv_heads, elements]."""
    return x.view(*x.shape[:2], -1).chunk(2, dim=2)


SPLIT = Packing("split", _split)
COLUMNS = Packing("columns", _columns)
TILES = Packing("tiles", _tiles)

_SPLIT_BACKENDS = {
    *("FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION", "TRITON_ATTN"),
    *("AMX_MLA", "CPU_MLA", "CUTLASS_MLA", "FLASHINFER_MLA", "FLASHMLA", "FLASH_ATTN_MLA"),
    "TRITON_MLA",
}
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def packing(
    backend: str, dtype: torch.dtype, kv_heads: int, tokens: int, head_dim: int
) -> Packing | None:
    """How the attention backend of that name in vLLM packs blocks; None if that is not known.

    `dtype` is the KV cache's: one with scales (fp8) is never known.
    """
    if dtype not in _PLAIN:
        return None
    if backend in _SPLIT_BACKENDS:
        return SPLIT
    if backend != "CPU_ATTN":
        return None
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        write = cpu_write(_get_attn_isa(dtype, tokens, head_dim))
    except (ImportError, AttributeError, TypeError):  # another vLLM
        return None
    like = torch.empty(3, kv_heads, tokens, 2 * head_dim, dtype=dtype)
    return next((known for known in (COLUMNS, TILES) if prove(known, write, like)), None)


def cpu_write(isa: str) -> Write:
    """What vLLM's CPU backend writes with, for one of its instruction sets."""
    from vllm import _custom_ops as ops

    def write(k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor) -> None:
        pages = blocks.view(*blocks.shape[:2], -1, k.shape[-1])
        ops.cpu_attn_reshape_and_cache(k, v, *pages.chunk(2, dim=2), slots, isa)

    return write


def layer_write(layer: Any) -> Write:
    """What an attention layer of a running vLLM writes with, whatever its backend. Not MLA."""

    def write(k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor) -> None:
        layer.impl.do_kv_cache_update(layer, k, v, blocks, slots)

    return write


def prove(known: Packing, write: Write, like: torch.Tensor) -> bool:
    """Whether `known` finds what `write` wrote, writes the same itself, and nothing else.

    The blocks are scratch memory that is `like` [blocks, kv_heads, block_size, 2 * dim] in shape,
    dtype, device and order of strides, and three blocks at most; `like` itself is not touched.
    """
    written, packed = torch.zeros_like(like[:3]), torch.zeros_like(like[:3])
    blocks, heads, tokens, width = written.shape
    block = blocks // 2
    random = torch.Generator().manual_seed(0)  # leaves the engine's own as it is
    order = torch.randperm(tokens, generator=random)
    k, v = (
        _bits((1, heads, tokens, width // 2), like.dtype, random).to(like.device) for _ in range(2)
    )
    key, value = (t[0, :, order].transpose(0, 1).contiguous() for t in (k, v))
    found = torch.zeros_like(k), torch.zeros_like(v)
    try:
        write(key, value, written, (block * tokens + order).to(like.device))
        known.unpack(written[block].unsqueeze(0), *found)
        known.pack(k, v, packed[block].unsqueeze(0))
    except Exception:  # whatever a foreign op or an impossible shape raises: not this packing
        return False
    return _same(found[0], k) and _same(found[1], v) and _same(packed, written)


def _bits(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    """Any bits, NaNs among them: keys and values are copied, never looked at."""
    raw = torch.empty(shape, dtype=dtype).view(torch.uint8)
    return torch.randint(256, raw.shape, dtype=torch.uint8, generator=random).view(dtype)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
