"""Limits: the most that a frame, which may be a stranger's, makes its reader do.

Beside them stand what the key that was asked for says of the layout, and the reader's own chunk
size: a frame has no more tokens than that, and its tensors at any step no more than `most_bytes`.
What is written keeps to the same limits, so that whatever is stored can be read.
"""

from __future__ import annotations

MAX_FRAME_BYTES = 1 << 30
"""No backend needs to read more for one frame; a larger one is damaged."""
MAX_HEADER_BYTES = 256 << 10
MAX_STEPS = 8
"""Serdes in a pipeline."""
MAX_TENSORS = 64
"""Tensors that a pipeline makes of one of the layout's before they become bytes."""


def most_bytes(chunk: int) -> int:
    """Bytes that a chunk of `chunk` bytes takes at any step between tensors and frame."""
    return 2 * chunk + (1 << 20)
