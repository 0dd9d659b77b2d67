"""What vLLM's block hashes do not stand for."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_connectors.vllm.identity import processing_identity


def seeing(folder: Path, multimodal: bool = True) -> Any:
    """The config of a model that sees, as far as it is looked at."""
    return SimpleNamespace(model=str(folder), revision=None, is_multimodal_model=multimodal)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    (folder / "processing_ours.py").write_text("SIZE = 224\n")
    return folder


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("preprocessor_config.json", '{"image_mean": [0.4]}'),
        ("processor_config.json", '{"patch_size": 14}'),
        ("processing_ours.py", "SIZE = 448\n"),
    ],
)
def test_what_makes_inputs_of_images_is_part_of_it(folder: Path, file: str, text: str) -> None:
    before = processing_identity(seeing(folder))
    (folder / file).write_text(text)
    assert processing_identity(seeing(folder)) != before


def test_where_it_lies_is_not(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "another place")
    assert processing_identity(seeing(other)) == processing_identity(seeing(folder)) != {}


def test_a_model_of_texts_has_none(folder: Path) -> None:
    assert processing_identity(seeing(folder, multimodal=False)) == {}
