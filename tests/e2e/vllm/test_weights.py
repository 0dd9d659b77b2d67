"""Weights that come and go through vLLM's own gates: what is stored belongs to what they are, and
is found again when they are back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from lmcache_connectors.vllm import held
from tests.e2e.vllm.conftest import engine, saved
from tests.e2e.vllm.test_changes import WHOLE, ask, known_as, moved
from tests.e2e.vllm.test_connector import flush, forget, prompt, worker


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model after a while."""
    return saved(AutoConfig.from_pretrained(llama), tmp_path_factory.mktemp("trained"), seed=1)


def test_weights_that_are_reloaded_from_elsewhere_and_back(
    llama: Path, trained: Path, disk: dict[str, Any]
) -> None:
    ids = prompt(200)
    with engine(trained, disk) as llm:
        other = ask(llm, ids)
        flush(llm)
    with engine(llama, disk) as llm:
        cold = ask(llm, ids)
        assert (cold[1], cold[0] != other[0]) == (0, True)
        flush(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(trained)})
        assert ask(llm, ids) == (other[0], WHOLE)  # what an engine that began with them stored
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(llama)})
        assert ask(llm, ids) == (cold[0], WHOLE)


@dataclass
class Nothing(WeightTransferInitInfo):
    """How a trainer and vLLM find each other."""


@dataclass
class Files(WeightTransferUpdateInfo):
    """What a trainer says it has sent."""

    folder: str


class Handed(WeightTransferEngine[Nothing, Files]):
    """Weights from a trainer, in the format of a checkpoint; by way of a file here."""

    init_info_cls = Nothing
    update_info_cls = Files

    def init_transfer_engine(self, init_info: Nothing) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # with no device to wait for

    def receive_weights(self, update_info: Files) -> None:
        self.model.load_weights(load_file(f"{update_info.folder}/model.safetensors").items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


@pytest.fixture
def transfer() -> Iterator[WeightTransferConfig]:
    WeightTransferEngineFactory.register_engine("handed", Handed)
    yield WeightTransferConfig(backend="handed")
    del WeightTransferEngineFactory._registry["handed"]


def test_weights_that_a_trainer_hands_over(
    llama: Path, trained: Path, disk: dict[str, Any], transfer: WeightTransferConfig
) -> None:
    ids = prompt(200)
    with engine(llama, disk, weight_transfer_config=transfer) as llm:
        cold = ask(llm, ids)[0]
        flush(llm)
        llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
        answers = []
        for folder in (trained, llama):
            llm.collective_rpc("start_weight_update")
            update = {"update_info": {"folder": str(folder)}}
            llm.collective_rpc("update_weights", kwargs=update)
            llm.collective_rpc("finish_weight_update")
            answers.append(ask(llm, ids))
            flush(llm)
        assert (answers[0][1], answers[0][0] != cold) == (0, True)
        assert answers[1] == (cold, WHOLE)
    with engine(trained, disk) as llm:  # what was computed with them serves who has them
        assert ask(llm, ids) == (answers[0][0], WHOLE)


def test_an_engine_that_wakes_up_is_asked_what_it_has_then(
    llama: Path, disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asleep it may have no weights, and nobody looks at them; its KV memory is mapped anew under
    the views that we were given. On the CPU vLLM only says that it sleeps: what it does on a GPU
    is done here by hand."""
    ids = prompt(200)
    with engine(llama, disk) as llm:
        cold, first = ask(llm, ids)[0], known_as(llm)
        flush(llm)
        with monkeypatch.context() as asleep:
            llm.sleep(level=1)
            asleep.setattr(held, "digests", pytest.fail)
            assert known_as(llm) == first
        for memory in worker(llm)._worker._memory:
            for layer in memory._layers:
                layer.zero_()
        llm.wake_up()
        assert ask(llm, ids) == (cold, WHOLE)
        llm.sleep(level=2)
        core = llm.llm_engine.engine_core.engine_core
        model = core.model_executor.driver_worker.worker.get_model()
        moved("model.embed_tokens.weight")(model)
        llm.wake_up(["weights"])
        assert known_as(llm) == first  # still half asleep
        llm.wake_up(["kv_cache"])
        other = ask(llm, ids)
        assert (other[1], known_as(llm) != first) == (0, True)
        forget(llm)
        assert ask(llm, ids) == (other[0], WHOLE)
        llm.collective_rpc("reload_weights")
        assert ask(llm, ids) == (cold, WHOLE)
