"""vLLM's plugin: registers the connector, and turns it on where the environment configures us.

vLLM calls `register` in every process, before it builds its config. An explicit
kv_transfer_config wins; with no LMCACHE_* variable set vLLM stays as it is.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

from lmcache_connectors import _vllm_weights
from lmcache_core import ConfigError, asks_strict, load_config

NAME = "LmcacheCoreConnector"
MODULE = "lmcache_connectors.vllm"

log = logging.getLogger("vllm.lmcache_core")


def register() -> None:
    """Called by vLLM, more than once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.engine.arg_utils import EngineArgs

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, MODULE, NAME)
    _vllm_weights.watch()
    create = EngineArgs.create_engine_config
    if not hasattr(create, "lmcache_core"):
        EngineArgs.create_engine_config = _with_default(create)


def _with_default(create: Any) -> Any:
    """EngineArgs.create_engine_config, with our connector where the environment asks for it."""

    @functools.wraps(create)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.kv_transfer_config is None and _is_configured():
            from vllm.config import KVTransferConfig

            self.kv_transfer_config = KVTransferConfig(
                kv_connector=NAME, kv_role="kv_both", kv_load_failure_policy="recompute"
            )
        return create(self, *args, **kwargs)

    wrapped.lmcache_core = True  # type: ignore[attr-defined]
    return wrapped


def _is_configured() -> bool:
    """Whether the environment says where KV is to be stored."""
    if not any(name.startswith("LMCACHE_") for name in os.environ):
        return False
    try:
        load_config()
    except ConfigError as error:
        if asks_strict():
            raise
        log.warning("lmcache-core is off, vLLM goes on without it: %s", error)
        return False
    return True
