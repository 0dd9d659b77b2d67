"""lmcache-core: stores the KV cache of LLM inference once and hands it back to every request."""

from lmcache_core.backend import Allocate, Options, StorageBackend, Stored
from lmcache_core.components import component, known
from lmcache_core.config import Config, Duration, SerdeConfig, Size, TierConfig, asks_strict
from lmcache_core.config import load as load_config
from lmcache_core.connector import Connector
from lmcache_core.engine import CacheEngine, Hit, TierInfo, open
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
from lmcache_core.eviction import LRU, EvictionPolicy
from lmcache_core.frame import Chunk
from lmcache_core.hooks import hookimpl
from lmcache_core.keys import ChunkKey, Namespace, TokenIds, tenant_digest
from lmcache_core.kv.content import combined_digest, tensor_digests
from lmcache_core.layout import (
    KVLayout,
    LayerGroup,
    Tensors,
    TensorSpec,
    byte_array,
    byte_view,
    copy_exact,
    views,
)
from lmcache_core.memory import own_stream, pin, point, scratch
from lmcache_core.observers import LOG
from lmcache_core.parts import Parts, cut, joined
from lmcache_core.serde import BytesToBytes, ChunkInfo, Serde, TensorsToBytes, TensorsToTensors
from lmcache_core.threads import run_threads_on, start_thread
from lmcache_core.workers import Workers

__all__ = [
    "LOG",
    "LRU",
    "Allocate",
    "BytesToBytes",
    "CacheEngine",
    "Chunk",
    "ChunkInfo",
    "ChunkKey",
    "Config",
    "ConfigError",
    "Connector",
    "DeadlineExceeded",
    "Duration",
    "EvictionPolicy",
    "FrameError",
    "Hit",
    "KVLayout",
    "LayerGroup",
    "LayoutError",
    "LmcacheError",
    "Namespace",
    "NoContent",
    "Options",
    "Parts",
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
    "Workers",
    "asks_strict",
    "byte_array",
    "byte_view",
    "combined_digest",
    "component",
    "copy_exact",
    "cut",
    "hookimpl",
    "joined",
    "known",
    "load_config",
    "open",
    "own_stream",
    "pin",
    "point",
    "run_threads_on",
    "scratch",
    "start_thread",
    "tenant_digest",
    "tensor_digests",
    "views",
]
__version__ = "0.1.0"
