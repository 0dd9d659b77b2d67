"""lmcache-core: stores the KV cache of LLM inference once and hands it back to every request.

What the author of an engine uses, and what a backend, a serde or a policy derives from. All else
that their authors use is in `lmcache_core.backend`, `.serde`, `.connector` and `.plugin`.
"""

from lmcache_core.backend import (
    LRU,
    Duration,
    EvictionPolicy,
    Options,
    Size,
    StorageBackend,
    StorageError,
    Stored,
)
from lmcache_core.config.loading import load as load_config
from lmcache_core.config.models import Config, SerdeConfig, TierConfig
from lmcache_core.engine.engine import CacheEngine, Gather, open
from lmcache_core.engine.hit import Hit, TierInfo
from lmcache_core.engine.prefetch import Prefetch
from lmcache_core.engine.removal import Removal
from lmcache_core.errors import ConfigError, LayoutError, LmcacheError
from lmcache_core.kv.chunk import Chunk
from lmcache_core.kv.keys import ChunkKey, TokenIds
from lmcache_core.kv.layout import KVLayout, LayerGroup, Tensors, TensorSpec, dtype_name
from lmcache_core.kv.namespace import Namespace
from lmcache_core.kv.tensors import copy_exact
from lmcache_core.kv.weights import Weights, unverified, weights_digest
from lmcache_core.plugins.hooks import hookimpl
from lmcache_core.serde import BytesToBytes, Serde, TensorsToBytes, TensorsToTensors

__all__ = [
    "LRU",
    "BytesToBytes",
    "CacheEngine",
    "Chunk",
    "ChunkKey",
    "Config",
    "ConfigError",
    "Duration",
    "EvictionPolicy",
    "Gather",
    "Hit",
    "KVLayout",
    "LayerGroup",
    "LayoutError",
    "LmcacheError",
    "Namespace",
    "Options",
    "Prefetch",
    "Removal",
    "Serde",
    "SerdeConfig",
    "Size",
    "StorageBackend",
    "StorageError",
    "Stored",
    "TensorSpec",
    "Tensors",
    "TensorsToBytes",
    "TensorsToTensors",
    "TierConfig",
    "TierInfo",
    "TokenIds",
    "Weights",
    "copy_exact",
    "dtype_name",
    "hookimpl",
    "load_config",
    "open",
    "unverified",
    "weights_digest",
]
__version__ = "0.1.0"
