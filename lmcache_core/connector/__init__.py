"""What the author of a connector uses, beside `lmcache_core`: the kit that every connector needs.

Where the config comes from and what happens without one (`start`), what a model's config says of
its KV (`identity`), the longest usable prefix over groups and ranks (`prefix`), what computing
takes (`steps`), an engine's blocks of memory (`memory`) or rows of it (`rows`).
"""

from lmcache_core.config.loading import environment_is_set, strict_requested
from lmcache_core.connector.identity import config_digest, depends_on_length, rope_types
from lmcache_core.connector.memory import Packing, PagedMemory
from lmcache_core.connector.prefix import Row, chunk_ends, first_kept, longest
from lmcache_core.connector.rows import Rows, row_layout
from lmcache_core.connector.start import go_on_without, is_strict, read_config
from lmcache_core.connector.steps import Steps
from lmcache_core.engine.load_gate import LoadGate
from lmcache_core.io.daemon_pool import DaemonPool
from lmcache_core.io.device import pooled_empty, record_event, side_stream
from lmcache_core.io.process import freed_in_children
from lmcache_core.io.threads import run_threads_on, start_thread
from lmcache_core.kv.content import combined_digest, tensor_digests
from lmcache_core.kv.filling import whole
from lmcache_core.kv.namespace import tenant_digest
from lmcache_core.plugins.log import LOG
from lmcache_core.plugins.registry import known

__all__ = [
    "LOG",
    "DaemonPool",
    "LoadGate",
    "Packing",
    "PagedMemory",
    "Row",
    "Rows",
    "Steps",
    "chunk_ends",
    "combined_digest",
    "config_digest",
    "depends_on_length",
    "environment_is_set",
    "first_kept",
    "freed_in_children",
    "go_on_without",
    "is_strict",
    "known",
    "longest",
    "pooled_empty",
    "read_config",
    "record_event",
    "rope_types",
    "row_layout",
    "run_threads_on",
    "side_stream",
    "start_thread",
    "strict_requested",
    "tenant_digest",
    "tensor_digests",
    "whole",
]
