"""The vLLM connector keeps what every connector promises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmcache_connectors.vllm.connector import LmcacheCoreConnector
from lmcache_core.backend import component
from lmcache_core.testing import Answer, ConnectorConformance, Serve
from tests.e2e.vllm.conftest import BLOCK, engine
from tests.e2e.vllm.test_connector import answers, worker


class Serving:
    """An engine that forgets its own blocks after each answer."""

    def __init__(self, llm: Any, connected: bool) -> None:
        self._llm = llm
        self._side = worker(llm)._worker if connected else None
        """The worker's; None where there is no cache."""

    def answer(self, prompt: Sequence[int]) -> Answer:
        before = self._loaded()
        ((tokens, said),) = answers(self._llm, list(prompt))
        assert self._side is None or self._side.flush(20)
        assert self._llm.reset_prefix_cache()
        # vLLM goes on counting what was to be loaded and did not come.
        return Answer(tokens, min(said, self._loaded() - before))

    def _loaded(self) -> int:
        """Tokens of all chunks that were loaded; here a chunk is a block."""
        stats = self._side._cache.engine.stats() if self._side else {}
        return BLOCK * sum(n for labels, n in stats.items() if labels[0] == "loaded")


class TestVllm(ConnectorConformance):
    chunk = BLOCK
    reads_config = True

    @pytest.fixture
    def serve(self, llama: Path) -> Serve:
        @contextlib.contextmanager
        def serve(settings: Mapping[str, Any] | None) -> Iterator[Serving]:
            with engine(llama, settings and dict(settings)) as llm:
                yield Serving(llm, connected=settings is not None)

        return serve


def test_the_connector_is_found_by_name() -> None:
    assert component("connectors", "vllm") is LmcacheCoreConnector
