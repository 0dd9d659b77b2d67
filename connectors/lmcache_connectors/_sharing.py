"""KV that several engines share: the Namespace that they agree on.

Each engine has names of its own for whose KV it is, and none can tell that another's weights are
the same as its own. So an operator says it, by giving both one name (`share_as`). What can be
checked is: the model's config, the layout and its dtype, and the tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

from lmcache_core import CacheEngine, KVLayout, Namespace, unverified
from lmcache_core.connector import config_digest


def shared_namespace(cache: CacheEngine, name: str, config: Any, layout: KVLayout) -> Namespace:
    """Of all engines whose operator calls the model `name`. `config`: Transformers', of the text
    model."""
    return cache.namespace(
        model=name,
        weights=unverified(name),
        layout=layout,
        extra={"shared": config_digest(config.to_dict()), "chunk": str(cache.chunk_size)},
    )
