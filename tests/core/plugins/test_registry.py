"""Components are found by name, late, and with help where they are not."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from lmcache_core import ConfigError
from lmcache_core.backend import component
from lmcache_core.connector import known
from lmcache_core.errors import UnknownComponent
from lmcache_core.plugins import registry as module


def test_built_ins_are_known() -> None:
    assert {"disk", "local_cpu"} <= set(known("backends"))
    assert {"raw", "safetensors", "zstd"} <= set(known("serdes"))
    assert component("backends", "disk").__name__ == "DiskBackend"


def test_an_unknown_name_lists_the_known_ones_and_the_closest() -> None:
    with pytest.raises(UnknownComponent) as raised:
        component("backends", "dsik")
    text = str(raised.value)
    assert "unknown backend 'dsik', did you mean 'disk'?" in text
    assert "Known: disk, local_cpu" in text


def test_a_missing_client_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("far", "no_such_module:Far [redis]", "lmcache_core.backends")
    monkeypatch.setattr(module, "_entries", lambda group: {"far": [entry]})
    with pytest.raises(ConfigError, match=r"no_such_module.*install lmcache-core\[redis\]"):
        component("backends", "far")


def test_lint_keeps_plugins_from_every_module_of_the_core() -> None:
    root = Path(__file__).parents[3]
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    forbidden = contracts["contracts"][2]["forbidden_modules"]
    rooms = {
        f"lmcache_core.{file.parent.name}" for file in (root / "lmcache_core").glob("*/__init__.py")
    }
    assert set(forbidden) == rooms - {"lmcache_core.connector"}  # public, as a folder


def test_importing_the_core_imports_no_plugin_and_no_client_library() -> None:
    program = (
        "import sys, lmcache_core; names = set(sys.modules)\n"
        "print(*(n for n in ('redis', 'pymemcache', 'aiobotocore', 'botocore', 'transformers', 'vllm', 'pytest',"
        " 'hypothesis', 'lmcache_backends', 'lmcache_serde', 'lmcache_connectors') if n in names))"
    )
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert out.stdout.decode().split() == []
