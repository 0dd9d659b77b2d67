"""Frames that earlier versions wrote still decode to what was stored."""

from __future__ import annotations

import pytest
import torch

from lmcache_core import frame as frames
from lmcache_core import known
from tests.serde import make_golden

FILES = sorted(make_golden.FOLDER.glob("*.frame"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_golden_frame_decodes(file) -> None:
    expected = make_golden.chunk()
    got = frames.decode([memoryview(file.read_bytes())], expected.key)
    assert (got.namespace, got.index, got.tokens) == (expected.namespace, 2, 5)
    assert set(got.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert torch.equal(got.tensors[name], tensor)


def test_every_serde_has_its_golden_frame() -> None:
    assert {file.name.split(".")[0] for file in FILES} >= set(known("serdes"))
