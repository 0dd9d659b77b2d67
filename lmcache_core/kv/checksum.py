"""A checksum of tensors' bytes as matrix products, for devices that hash nothing themselves.

Each 4,096 bytes, taken as signed integers, are multiplied by a fixed random matrix of 16 columns,
exactly. Where some of them change, at most one of the 256 values of an entry of the matrix hides
it from a column: odds of 2**-128 for all 16. The products' bytes go through another matrix in the
same way, and what is left, a 4,096th, comes to the host in one copy, to be hashed there. A change
that does not know the matrices goes unseen with less than 2**-126.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import torch

BLOCK = 4096
"""Bytes that are multiplied at once."""
COLUMNS = 16
ROWS = BLOCK // (COLUMNS * 4)
"""Products (of 4 bytes a column) that make a block again."""
EXACT = 1024
"""Products of two bytes add up to no more than 2**24 in so many, which float32 holds exactly."""
SLICE = 4096
"""Blocks that are turned into float32 at once: 64 MiB."""


def checksums(flat: Sequence[torch.Tensor]) -> list[bytes]:
    """What is left of each: `flat` are bytes [n] (uint8) on one device. Waits for it once."""
    device = flat[0].device
    counts = [max(1, -(-tensor.numel() // (BLOCK * ROWS))) for tensor in flat]
    folded = torch.zeros(sum(counts), BLOCK, dtype=torch.int8, device=device)
    start = 0
    for tensor, count in zip(flat, counts, strict=True):
        _multiply(tensor, folded[start : start + count])
        start += count
    left = _product(folded, _matrix(1, device)).cpu().numpy().tobytes()
    ends = [sum(counts[: n + 1]) * COLUMNS * 4 for n in range(len(counts))]
    return [left[end - n * COLUMNS * 4 : end] for end, n in zip(ends, counts, strict=True)]


def _multiply(flat: torch.Tensor, out: torch.Tensor) -> None:
    """Write the products of the bytes, zeros behind them, into the blocks `out`."""
    target = out.view(torch.int32).view(-1, COLUMNS)
    matrix = _matrix(0, flat.device)
    whole = flat.numel() // BLOCK
    body = flat[: whole * BLOCK].view(torch.int8).view(-1, BLOCK)
    if whole:
        target[:whole] = _product(body, matrix)
    if flat.numel() > whole * BLOCK:
        last = torch.zeros(1, BLOCK, dtype=torch.int8, device=flat.device)
        last.view(torch.uint8)[0, : flat.numel() - whole * BLOCK] = flat[whole * BLOCK :]
        target[whole] = _product(last, matrix)[0]


def _product(blocks: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Blocks [n, BLOCK] of int8 times the matrix, [n, COLUMNS] of int32, exactly."""
    if blocks.is_cuda and blocks.shape[0] > ROWS and blocks.data_ptr() % 16 == 0:
        return torch._int_mm(blocks, matrix)
    parts = [_in_float(some, matrix) for some in blocks.split(SLICE)]
    return torch.cat(parts)


def _in_float(blocks: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The same where there is no product of integers. TF32 and bfloat16 hold a byte exactly, so
    that torch's precision of float32 products does not matter."""
    out = torch.zeros(blocks.shape[0], COLUMNS, dtype=torch.int32, device=blocks.device)
    for k in range(0, BLOCK, EXACT):
        columns = slice(k, k + EXACT)
        out += (blocks[:, columns].float() @ matrix[columns].float()).to(torch.int32)
    return out


@functools.cache
def _matrix(number: int, device: torch.device) -> torch.Tensor:
    """One of the fixed matrices, [BLOCK, COLUMNS] of int8."""
    seed = f"lmcache-core checksum {number}".encode()
    data = bytearray(hashlib.shake_256(seed).digest(BLOCK * COLUMNS))
    return torch.frombuffer(data, dtype=torch.int8).view(BLOCK, COLUMNS).to(device)
