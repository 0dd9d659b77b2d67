"""vLLM's plugin: registers connector and tier, and turns the connector on where the environment
configures us.

vLLM calls `register` in every process, before it builds its config. An explicit
kv_transfer_config wins; with no LMCACHE_* variable set vLLM stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

from lmcache_connectors.vllm import held
from lmcache_connectors.vllm.weights import watch
from lmcache_core import load_config
from lmcache_core.connector import environment_is_set, go_on_without, strict_requested

NAME = "LmcacheCoreConnector"
MODULE = "lmcache_connectors.vllm.connector"
TIER = "LmcacheCoreTier"
TIER_MODULE = "lmcache_connectors.vllm.tier"

log = logging.getLogger("vllm.lmcache_core")


def register() -> None:
    """Called by vLLM, more than once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, MODULE, NAME)
    watch()
    if current_platform.is_cpu():
        held.watch()
    create = EngineArgs.create_engine_config
    if not hasattr(create, "lmcache_core"):
        EngineArgs.create_engine_config = _with_default(create)
    with contextlib.suppress(ImportError):  # vLLM before its tiers
        _register_tier()


def _register_tier() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    if TIER not in SecondaryTierFactory._registry:
        SecondaryTierFactory.register_tier(TIER, TIER_MODULE, TIER)
    create = KVConnectorFactory.create_connector
    if not hasattr(create, "lmcache_core"):
        KVConnectorFactory.create_connector = staticmethod(_with_config(create))


def _with_config(create: Any) -> Any:
    """KVConnectorFactory.create_connector, during which our tier can ask for vLLM's config: what
    vLLM hands to a tier does not tell one revision of a model from another."""

    @functools.wraps(create)
    def wrapped(config: Any, *args: Any, **kwargs: Any) -> Any:
        if TIER not in str(config.kv_transfer_config):
            return create(config, *args, **kwargs)
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(config):
            return create(config, *args, **kwargs)

    wrapped.lmcache_core = True  # type: ignore[attr-defined]
    return wrapped


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
    if not environment_is_set():
        return False
    try:
        load_config()
    except Exception as error:  # vLLM must start
        go_on_without("vLLM", error, strict=strict_requested(), logger=log)
        return False
    return True
