"""vLLM's own prefix cache, as far as it holds what must not be stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager


class OwnCache:
    """Blocks that vLLM keeps in its memory. When weights or an adapter change, those that it has
    belong to what is gone, and so do those that running requests go on to fill."""

    def __init__(self) -> None:
        self.blocks: KVCacheManager | None = None
        """vLLM's, once it has told."""
        self._running: set[str] = set()
        self._mixed: set[str] = set()
        """Requests that ran while something changed."""
        self._kept = False
        """Whether there are old blocks that could not be taken out."""

    def begin(self, request: str) -> None:
        """A request arrived."""
        self._running.add(request)

    def end(self, request: str) -> None:
        """A request is done. After the last of those that ran while something changed, no old
        block is left."""
        self._running.discard(request)
        if request in self._mixed:
            self._mixed.discard(request)
            if not self._mixed:
                self._evict()

    def outdate(self) -> None:
        """Take all blocks out of it."""
        self._mixed |= self._running
        self._evict()

    def reset(self) -> None:
        """VLLM has emptied it."""
        self._kept = False

    @property
    def outdated(self) -> bool:
        """Whether a hit in it may be of other weights than those of now."""
        return self._kept or bool(self._mixed)

    def _evict(self) -> None:
        if self.blocks is None:
            self._kept = True
        else:
            self.blocks.evict_blocks(set(range(len(self.blocks.block_pool.blocks))))
