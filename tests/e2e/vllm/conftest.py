"""Real vLLM on the CPU with tiny random models. Runs where vLLM is installed: make test does it
in an environment of its own."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lmcache_core.connector import start

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")

BLOCK = 32
"""Tokens of a block in these tests."""
Engine = Callable[..., contextlib.AbstractContextManager[Any]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what may take long, so that no worker is left with it when the others have ended."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture(autouse=True)
def _no_leaks() -> None:
    """vLLM's own threads and files come and go; what we leave behind is tested elsewhere."""


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pytest hear what vLLM's logger is told, each time anew."""
    from vllm.logger import DEFAULT_LOGGING_CONFIG

    monkeypatch.setattr(start, "_said", set())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    # The first engine of a process configures it once more.
    monkeypatch.setitem(DEFAULT_LOGGING_CONFIG["loggers"]["vllm"], "propagate", True)


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    """kv_connector_extra_config with one tier, a chunk for each block."""
    tier = {"backend": "disk", "path": str(tmp_path / "kv"), "capacity": "1GiB"}
    return {"chunk_size": BLOCK, "tiers": [tier]}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of full attention."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=512, max_position_embeddings=2048,
    )  # fmt: skip
    return saved(config, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `llama`, with long prompts and a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("reader")
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=len(names), max_position_embeddings=20480,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return saved(config, folder)


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sliding layers and a full one: two kinds of KV cache groups."""
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=512, max_position_embeddings=2048,
        sliding_window=64, sliding_window_pattern=4, query_pre_attn_scalar=32,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    return saved(config, tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sliding layers only, all in one KV cache group."""
    from transformers import MistralConfig

    config = MistralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=512, max_position_embeddings=2048,
        sliding_window=128,
    )  # fmt: skip
    return saved(config, tmp_path_factory.mktemp("mistral"))


def saved(config: Any, folder: Path, seed: int = 0) -> Path:
    """A model of random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


@contextlib.contextmanager
def engine(model: Path, extra: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """An LLM in this process. `extra`: kv_connector_extra_config; without it, no connector. It
    loads even though these models compute faster than any store, unless `extra` says otherwise."""
    from vllm import LLM
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    ensure_kv_transfer_shutdown()  # of an engine that did not start
    settings: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "kv_cache_memory_bytes": 32 << 20,
        "block_size": BLOCK,
        "max_model_len": 1024,
    }
    if extra is not None:
        extra = {"load": "always", **extra} if "tiers" in extra else extra
        settings["kv_transfer_config"] = {
            "kv_connector": "LmcacheCoreConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
    with _only_new_garbage():
        llm = LLM(**{**settings, **options})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


@contextlib.contextmanager
def _only_new_garbage() -> Iterator[None]:
    """vLLM collects garbage several times an engine, most of the time that one takes here: let it
    look at what the engine makes, and not at all that was ever imported."""
    gc.collect()
    gc.freeze()
    with mock.patch.multiple(gc, freeze=lambda: None, unfreeze=lambda: None):
        yield
