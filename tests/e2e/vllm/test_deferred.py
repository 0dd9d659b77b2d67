"""Room for what is to be loaded that vLLM makes in a later step, or never, as 0.33 may: 0.32 makes
it at once, so the connector is told late here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcache_connectors.vllm.connector import LmcacheCoreConnector
from lmcache_connectors.vllm.shape import Shape
from lmcache_core import ConfigError
from tests.e2e.vllm.conftest import engine
from tests.e2e.vllm.native import vllm_config
from tests.e2e.vllm.test_changes import WHOLE, moved
from tests.e2e.vllm.test_connector import GREEDY, answers, connector, forget, prompt, stats

IDS = prompt(200)
STEPS = 3


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the connector has not been told yet; it hears it with the first step after it was given
    leave by `None`."""
    waiting: list[Any] = []
    tell = LmcacheCoreConnector.update_state_after_alloc
    build = LmcacheCoreConnector.build_connector_meta

    def later(self: Any, request: Any, blocks: Any, external: int) -> None:
        if external:
            waiting.append((self, request, blocks, external))

    def now(self: Any, output: Any) -> Any:
        if None in waiting:
            for told in [each for each in waiting if each is not None]:
                tell(*told)
            waiting.clear()
        return build(self, output)

    monkeypatch.setattr(LmcacheCoreConnector, "update_state_after_alloc", later)
    monkeypatch.setattr(LmcacheCoreConnector, "build_connector_meta", now)
    return waiting


def answered_late(llm: Any, late: list[Any], meanwhile: Callable[[], Any]) -> list[int]:
    """The tokens of a request that is to be loaded, where something happens before it is."""
    core = llm.llm_engine
    core.add_request("late", {"prompt_token_ids": IDS}, GREEDY)
    while not late:
        core.step()
    for _ in range(STEPS):
        core.step()
    assert len(late) == 1
    meanwhile()
    late.append(None)
    outs = []
    while core.has_unfinished_requests():
        outs += core.step()
    return list(outs[-1].outputs[0].token_ids)


def loaded(llm: Any) -> int:
    return sum(n for labels, n in stats(llm).items() if labels[0] == "loaded")


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_room_that_is_made_later(
    name: str, request: pytest.FixtureRequest, disk: dict[str, Any], late: list[Any]
) -> None:
    with engine(request.getfixturevalue(name), disk) as llm:
        cold = answers(llm, IDS)[0][0]
        forget(llm)
        assert answered_late(llm, late, lambda: None) == cold
        assert loaded(llm) >= WHOLE // 32


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_what_was_found_is_gone_by_then(
    name: str,
    request: pytest.FixtureRequest,
    disk: dict[str, Any],
    late: list[Any],
    tmp_path: Path,
) -> None:
    with engine(request.getfixturevalue(name), disk) as llm:
        cold = answers(llm, IDS)[0][0]
        forget(llm)
        gone = tmp_path / "kv" / "chunks"
        assert answered_late(llm, late, lambda: shutil.rmtree(gone)) == cold
        assert loaded(llm) == 0


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_weights_are_others_by_then(
    name: str, request: pytest.FixtureRequest, disk: dict[str, Any], late: list[Any]
) -> None:
    """What was found belongs to what is gone."""
    model = request.getfixturevalue(name)
    change = moved("model.layers.0.input_layernorm.weight")
    with engine(model) as llm:
        llm.apply_model(change)
        expected = answers(llm, IDS)[0][0]
    with engine(model, disk) as llm:
        answers(llm, IDS)
        forget(llm)
        assert answered_late(llm, late, lambda: llm.apply_model(change)) == expected
        assert loaded(llm) == 0


def test_room_that_is_never_made(llama: Path, disk: dict[str, Any], late: list[Any]) -> None:
    with engine(llama, disk) as llm:
        cold = answers(llm, IDS)[0][0]
        forget(llm)
        core = llm.llm_engine
        found = connector(llm)._scheduler.match
        core.add_request("late", {"prompt_token_ids": IDS}, GREEDY)
        (request,) = core.engine_core.engine_core.scheduler.requests.values()
        while not found(request, 0):
            pass
        core.abort_request(["late"])
        assert not connector(llm)._scheduler._promised
        late.append(None)
        assert answers(llm, IDS)[0][0] == cold
        forget(llm)


def test_kv_that_is_kept_in_a_form_that_nobody_knows_is_refused_by_its_name(llama: Path) -> None:
    """VLLM 0.33 lets plugins register their own."""
    config = vllm_config(llama)
    config.cache_config.cache_dtype = "a_plugins_own"
    with pytest.raises(ConfigError, match="KV in 'a_plugins_own', which is not known"):
        Shape(config, None, None, "")
