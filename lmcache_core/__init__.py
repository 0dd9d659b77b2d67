"""lmcache-core: stores the KV cache of LLM inference once and hands it back to every request."""

from lmcache_core.backend import (
    DaemonPool,
    StorageBackend,
    Stored,
    host_register,
    start_thread,
)
from lmcache_core.config.loading import load as load_config
from lmcache_core.config.loading import strict_requested
from lmcache_core.config.models import Config, SerdeConfig, TierConfig
from lmcache_core.engine.engine import CacheEngine, Gather, open
from lmcache_core.engine.hit import Hit, TierInfo
from lmcache_core.engine.prefetch import Prefetch
from lmcache_core.engine.removal import Removal
from lmcache_core.errors import (
    ConfigError,
    DeadlineExceeded,
    FrameError,
    LayoutError,
    LmcacheError,
    NoContent,
    StorageError,
    UnknownComponent,
)
from lmcache_core.io.buffers import Buffers, concat, split_at
from lmcache_core.io.device import pooled_empty, record_event, side_stream
from lmcache_core.io.threads import run_threads_on
from lmcache_core.kv.chunk import Chunk
from lmcache_core.kv.content import combined_digest, tensor_digests
from lmcache_core.kv.keys import ChunkKey, TokenIds
from lmcache_core.kv.layout import (
    DTYPES,
    KVLayout,
    LayerGroup,
    Tensors,
    TensorSpec,
    dtype_name,
)
from lmcache_core.kv.namespace import Namespace, tenant_digest
from lmcache_core.kv.tensors import byte_array, byte_view, copy_exact, views
from lmcache_core.kv.weights import Weights, unverified, weights_digest
from lmcache_core.plugins.hooks import hookimpl
from lmcache_core.plugins.log import LOG
from lmcache_core.plugins.options import Options
from lmcache_core.plugins.registry import component, known
from lmcache_core.plugins.units import Duration, Size
from lmcache_core.policy.eviction import EvictionPolicy
from lmcache_core.policy.lru import LRU
from lmcache_core.serde import BytesToBytes, ChunkInfo, Serde, TensorsToBytes, TensorsToTensors

__all__ = [
    "DTYPES",
    "LOG",
    "LRU",
    "Buffers",
    "BytesToBytes",
    "CacheEngine",
    "Chunk",
    "ChunkInfo",
    "ChunkKey",
    "Config",
    "ConfigError",
    "DaemonPool",
    "DeadlineExceeded",
    "Duration",
    "EvictionPolicy",
    "FrameError",
    "Gather",
    "Hit",
    "KVLayout",
    "LayerGroup",
    "LayoutError",
    "LmcacheError",
    "Namespace",
    "NoContent",
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
    "UnknownComponent",
    "Weights",
    "byte_array",
    "byte_view",
    "combined_digest",
    "component",
    "concat",
    "copy_exact",
    "dtype_name",
    "hookimpl",
    "host_register",
    "known",
    "load_config",
    "open",
    "pooled_empty",
    "record_event",
    "run_threads_on",
    "side_stream",
    "split_at",
    "start_thread",
    "strict_requested",
    "tenant_digest",
    "tensor_digests",
    "unverified",
    "views",
    "weights_digest",
]
__version__ = "0.1.0"
