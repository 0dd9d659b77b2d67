"""Frames that earlier versions wrote still decode to what was stored."""

from __future__ import annotations

import pytest

from lmcache_core.connector import known
from lmcache_core.frames import frame as frames
from tests.serde import make_golden

FILES = sorted(make_golden.FOLDER.glob("*.frame"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_golden_frame_decodes(file) -> None:
    name = file.name.split(".")[0]
    pipeline = make_golden.pipeline(make_golden.PIPELINES[name])
    expected = make_golden.chunk()
    data = memoryview(file.read_bytes())
    got = frames.decode([data], expected.key, pipeline, make_golden.TOKENS)
    assert (got.namespace, got.index, got.tokens) == (expected.namespace, 2, 5)
    assert set(got.tensors) == set(expected.tensors)
    for part, tensor in expected.tensors.items():
        error = (got.tensors[part].float() - tensor.float()).abs().max()
        assert float(error) <= make_golden.LOSSY.get(name, 0.0)


def test_every_serde_has_its_golden_frame() -> None:
    assert {file.name.split(".")[0] for file in FILES} >= set(known("serdes"))
