"""KV that several engines share: the Namespace that they agree on.

Each engine has names of its own for whose KV it is, and none can tell that another's weights are
the same as its own. So an operator says it, by giving both one name (`share_as`). What can be
checked is: the model's config, the layout and its dtype, and the tokens of a chunk.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lmcache_core import CacheEngine, KVLayout, Namespace

_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
"""Config keys that say nothing of what the KV will be."""


def config_digest(config: Any) -> str:
    """Of a Transformers config, as far as it says what the KV will be."""
    fields = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def shared_namespace(cache: CacheEngine, name: str, config: Any, layout: KVLayout) -> Namespace:
    """Of all engines whose operator calls the model `name`. `config`: Transformers', of the text
    model."""
    return cache.namespace(
        model=name,
        layout=layout,
        extra={"shared": config_digest(config), "chunk": str(cache.chunk_size)},
    )
