"""The serde that docs/serdes.md shows keeps what a serde promises."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from lmcache_core import load_config
from lmcache_core.plugins import registry as components
from lmcache_core.serde import Serde
from lmcache_core.testing import SerdeConformance

PAGE = (Path(__file__).parents[2] / "docs" / "serdes.md").read_text()
(CODE,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "class Zlib(" in code]
SHOWN: dict[str, Any] = {"__name__": __name__}
exec(CODE, SHOWN)
Zlib = SHOWN["Zlib"]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("zlib", f"{__name__}:Zlib", "lmcache_core.serdes")
    monkeypatch.setitem(components._entries("serdes"), "zlib", [entry])


class TestZlib(SerdeConformance):
    @pytest.fixture
    def serde(self) -> Serde:
        return Zlib(Zlib.Options())


def test_it_stands_in_a_pipeline() -> None:
    tier = {"backend": "local_cpu", "capacity": 9, "serde": ["byteplane", {"zlib": {"level": 9}}]}
    (config,) = load_config({"tiers": [tier]}).tiers
    assert [serde.name for serde in config.serde] == ["byteplane", "zlib"]
