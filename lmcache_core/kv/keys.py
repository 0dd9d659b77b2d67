"""ChunkKey and the chained hash: whose KV, of which tokens.

    namespace digest = BLAKE2b-128(canonical JSON of the Namespace)
    h_0 = BLAKE2b-128(namespace digest || tokens_0)
    h_i = BLAKE2b-128(h_(i-1)          || tokens_i)

Tokens are little-endian uint32. A chunk's hash therefore stands for every token before it as well,
which is what its keys and values depend on. 128 bits of a cryptographic hash, the same in every
process, machine and Python.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Sequence

import numpy as np
import torch

TokenIds = Sequence[int] | np.ndarray | torch.Tensor


class ChunkKey(bytes):
    """32 bytes: namespace digest (16), chained hash (16). Its text is 64 hex digits.

    A `bytes`, so that dictionaries hash it natively and an index entry stays small.
    """

    __slots__ = ()

    def __new__(cls, value: bytes) -> ChunkKey:
        if len(value) != 32:
            raise ValueError(f"a chunk key has 32 bytes, not {len(value)}")
        return super().__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> ChunkKey:
        """The key whose `str()` is `text`. Raises ValueError for anything else."""
        key = cls(bytes.fromhex(text))
        if str(key) != text:
            raise ValueError(f"not the text of a chunk key: {text!r}")
        return key

    @property
    def namespace(self) -> bytes:
        """The namespace digest, 16 bytes."""
        return self[:16]

    @property
    def hash(self) -> bytes:
        """The chained hash of all tokens up to this chunk's end, 16 bytes."""
        return self[16:]

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"ChunkKey({self.hex()})"


def token_bytes(token_ids: TokenIds) -> bytes:
    """Token ids as little-endian uint32. Raises ValueError for what is none."""
    if isinstance(token_ids, torch.Tensor):
        token_ids = token_ids.detach().cpu().numpy()
    if isinstance(token_ids, np.ndarray):
        return _array_bytes(token_ids)
    try:
        ids = array.array("I", token_ids)  # twice as fast as numpy on a list
    except (OverflowError, TypeError) as error:
        raise ValueError(f"token ids are integers in [0, 2**32): {error}") from None
    if ids.itemsize != 4 or sys.byteorder != "little":
        return np.asarray(ids).astype("<u4").tobytes()
    return ids.tobytes()


def _array_bytes(ids: np.ndarray) -> bytes:
    if ids.ndim != 1:
        raise ValueError(f"token ids are one sequence; got shape {ids.shape}")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token ids are integers; got {ids.dtype}")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 2**32):
        raise ValueError("token ids are integers in [0, 2**32)")
    return ids.astype("<u4").tobytes()
