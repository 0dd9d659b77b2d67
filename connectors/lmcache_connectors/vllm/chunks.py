"""Chunks of vLLM's blocks: what the scheduler's side and the workers have to agree on.

A chunk is one or more neighbouring blocks of one KV cache group, [chunk * n, chunk * (n + 1))
tokens; the last one of a prefix may be shorter. Its key is made of vLLM's hash of the prefix up to
its end, so a short chunk and the long one that replaces it are different chunks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache_core import ChunkKey, Namespace


class Group:
    """A KV cache group of one worker."""

    def __init__(
        self,
        namespace: Namespace,
        block: int,
        window: int | None,
        keyed: bool = False,
    ) -> None:
        """`block`: tokens of a block. `window`: tokens that its layers attend to. `keyed`: hashes
        are keys."""
        self.namespace, self.block, self.window = namespace, block, window
        self._keyed = keyed
        self._salted = {"": namespace}

    def salted(self, salt: str) -> Namespace:
        """The namespace of blocks that depend on `salt`, too."""
        if salt not in self._salted:
            self._salted[salt] = self.namespace.model_copy(update={"adapter": salt})
        return self._salted[salt]

    def keys(self, hashes: Iterable[bytes], salt: str) -> list[ChunkKey]:
        """Of the chunks at whose ends vLLM's hashes are these."""
        if self._keyed and not salt:
            return [ChunkKey(each) for each in hashes]
        return self.salted(salt).keys_from_hashes(hashes)


def all_or_nothing(windows: Sequence[int | None]) -> bool:
    """Whether a load is of use only if all of it comes. Where a block is missing, vLLM computes on
    from there if there is one group, whose blocks are all there up to the missing one: those that
    a window has left are not. `windows`: tokens that each group attends to, None for all."""
    return len(windows) > 1 or windows[0] is not None


class Adapter(NamedTuple):
    """A LoRA adapter as the workers have loaded it."""

    number: int
    """VLLM's."""
    digest: str
    """Stands for all of it."""
    ranks: tuple[str, ...]
    """For what each worker has."""


@dataclass
class Chunks:
    """Chunks of one request, to be loaded or stored."""

    request: str
    salt: str
    """What they depend on besides their tokens and the weights: an adapter, by content."""
    ends: list[int]
    """Tokens up to the end of each chunk, from the root on."""
    hashes: list[bytes]
    """vLLM's, of the prefix up to each of these ends."""
    begin: int
    """The first token to load or store."""
    end: int
    """Behind the last one."""
    block_ids: tuple[list[int], ...]
    """For each group, from the request's first block on; 0 where vLLM keeps none."""
    tiers: list[list[list[int]]] = field(default_factory=list)
    """Of a load: where each chunk is, by rank and group."""
    adapter: Adapter | None = None

    def first_block(self, group: int, block: int) -> int:
        """The first block of `group` to move: behind those that a sliding window has left."""
        ids = self.block_ids[group]
        first = self.begin // block
        while first < len(ids) and ids[first] == 0:
            first += 1
        return first

    def place(self, token: int) -> int:
        """Which chunk holds `token`."""
        return bisect_right(self.ends, token)

    def start(self, place: int, chunk: int) -> int:
        """The first token of a chunk."""
        return (self.ends[place] - 1) // chunk * chunk
