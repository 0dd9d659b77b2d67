"""ConnectorConformance: everything that a connector promises, whatever its engine."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import pytest


class Answer(NamedTuple):
    """What an engine generated."""

    tokens: list[int]
    reused: int
    """Tokens of the prompt that were loaded and not computed."""


class Engine(Protocol):
    """An engine that serves, with a connector or without."""

    def answer(self, prompt: Sequence[int]) -> Answer:
        """Generate a few tokens, greedily. What it computed is stored when this returns, and the
        engine has forgotten whatever it keeps itself."""


Serve = Callable[[Mapping[str, Any] | None], contextlib.AbstractContextManager[Engine]]
"""(config) -> an engine of the same model each time, beside a cache of this config (what a YAML
file would hold); without us for None. Loading counts as worth it (`load: always`)."""


class ConnectorConformance:
    """Subclass it, name it Test..., and define one fixture.

    serve: a `Serve`.
    """

    chunk: ClassVar[int] = 16
    """Tokens of a chunk; a multiple of the engine's own blocks."""
    vocabulary: ClassVar[int] = 500
    """Token ids below it are valid."""
    reads_config: ClassVar[bool] = False
    """The connector opens the cache itself, by the engine's settings: what is wrong with them must
    not keep the engine from serving, unless they say `strict`. Others are handed an open cache."""

    def __init_subclass__(cls) -> None:
        """Take out the test of an ability that the connector does not claim."""
        super().__init_subclass__()
        if not cls.reads_config:
            cls.test_a_wrong_config_costs_no_answer = None  # type: ignore[method-assign, assignment]

    @pytest.fixture
    def store(self, tmp_path: Path) -> Path:
        """Where the config of `disk` keeps chunks."""
        return tmp_path / "kv"

    @pytest.fixture
    def disk(self, store: Path) -> dict[str, Any]:
        """A config with one tier that outlives an engine."""
        tier = {"backend": "disk", "path": str(store), "capacity": "64MiB"}
        return self.config(tier)

    def config(self, *tiers: Mapping[str, Any]) -> dict[str, Any]:
        return {"chunk_size": self.chunk, "load": "always", "tiers": list(tiers)}

    def prompt(self, chunks: float, seed: int = 0) -> list[int]:
        count = int(chunks * self.chunk)
        return random.Random(seed).choices(range(3, self.vocabulary), k=count)

    # Reuse

    def test_a_prompt_comes_back_and_its_answer_stays(
        self, serve: Serve, disk: dict[str, Any]
    ) -> None:
        prompt = self.prompt(5.5)
        with serve(None) as plain:
            expected = plain.answer(prompt).tokens
        with serve(disk) as engine:
            assert engine.answer(prompt) == (expected, 0)
            assert engine.answer(prompt) == (expected, 5 * self.chunk)
        with serve(disk) as another:  # by what the first one stored
            assert another.answer(prompt) == (expected, 5 * self.chunk)

    def test_prompts_that_part_share_what_is_before(
        self, serve: Serve, disk: dict[str, Any]
    ) -> None:
        one = self.prompt(5.5)
        two = [*one[: 3 * self.chunk + 2], *self.prompt(2, seed=1)]
        with serve(None) as plain:
            expected = plain.answer(two).tokens
        with serve(disk) as engine:
            engine.answer(one)
            assert engine.answer(two) == (expected, 3 * self.chunk)

    def test_a_prompt_of_whole_chunks_leaves_a_token_to_compute(
        self, serve: Serve, disk: dict[str, Any]
    ) -> None:
        prompt = self.prompt(4)
        with serve(disk) as engine:
            cold = engine.answer(prompt)
            warm = engine.answer(prompt)
        assert warm.tokens == cold.tokens
        assert 3 * self.chunk <= warm.reused < len(prompt)

    def test_a_short_prompt_is_just_computed(self, serve: Serve, disk: dict[str, Any]) -> None:
        prompt = self.prompt(0.5)
        with serve(disk) as engine:
            assert engine.answer(prompt) == engine.answer(prompt)

    # What must never be felt

    def test_damage_is_computed_anew_and_replaced(
        self, serve: Serve, disk: dict[str, Any], store: Path
    ) -> None:
        prompt = self.prompt(5.5)
        with serve(disk) as engine:
            expected = engine.answer(prompt).tokens
            _damage(store)
            damaged = engine.answer(prompt)
            assert damaged.tokens == expected
            assert damaged.reused < 5 * self.chunk
            assert engine.answer(prompt) == (expected, 5 * self.chunk)

    def test_a_store_that_is_down_costs_no_answer(self, serve: Serve) -> None:
        with socket.socket() as taken:  # bound and not listening: nobody answers there
            taken.bind(("127.0.0.1", 0))
            url = f"redis://127.0.0.1:{taken.getsockname()[1]}"
            prompt = self.prompt(3.5)
            with serve(None) as plain:
                expected = plain.answer(prompt).tokens
            with serve(
                self.config({"backend": "redis", "url": url, "deadline": "200ms"})
            ) as engine:
                assert engine.answer(prompt) == (expected, 0)
                assert engine.answer(prompt) == (expected, 0)

    def test_a_wrong_config_costs_no_answer(
        self, serve: Serve, caplog: pytest.LogCaptureFixture
    ) -> None:
        wrong = {"tiers": [{"backend": "dsik"}]}
        prompt = self.prompt(3.5)
        with serve(None) as plain:
            expected = plain.answer(prompt).tokens
        with serve(wrong) as engine:
            assert engine.answer(prompt) == (expected, 0)
        assert "did you mean 'disk'" in caplog.text

    def test_unless_it_is_strict(self, serve: Serve) -> None:
        """The error reaches whoever starts the engine, or opens the cache."""
        wrong = {"strict": True, "tiers": [{"backend": "dsik"}]}
        with pytest.raises(Exception, match="did you mean 'disk'"), serve(wrong):
            pass


def _damage(store: Path) -> None:
    """One byte of one chunk's payload is another."""
    chunk = next(file for file in store.rglob("*") if file.is_file() and len(file.name) == 64)
    data = bytearray(chunk.read_bytes())
    data[-len(data) // 3] ^= 1
    chunk.write_bytes(data)
