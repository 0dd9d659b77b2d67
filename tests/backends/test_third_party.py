"""A package of somebody else's: installed, found by name, and passing the public suite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "examples" / "third_party_backend"
PROGRAM = """
import lmcache_core
from lmcache_core.connector import known
print(known("backends"))
with lmcache_core.open("cache.yaml") as cache:
    print(type(cache._tiers[0]._backend).__module__)
try:
    lmcache_core.open({"tiers": [{"backend": "sqlite", "path": "x", "pth": 1}]})
except lmcache_core.ConfigError as error:
    print(error)
"""


def run(*command: str, cwd: Path, path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    out = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


def test_it_is_found_by_its_entry_point_and_configured_like_our_own(tmp_path: Path) -> None:
    site = tmp_path / "site"
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
        "--target", str(site), str(PACKAGE), cwd=tmp_path, path=site,
    )  # fmt: skip
    (tmp_path / "cache.yaml").write_text("tiers: [{backend: sqlite, path: kv.sqlite}]")
    lines = run(sys.executable, "-c", PROGRAM, cwd=tmp_path, path=site).splitlines()
    assert "'sqlite'" in lines[0]
    assert lines[1] == "lmcache_sqlite"
    assert lines[2].startswith("tiers[0].pth: unknown key, did you mean 'path'?")


def test_it_passes_the_public_suite() -> None:
    run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(PACKAGE),
        str(PACKAGE), cwd=PACKAGE, path=PACKAGE,
    )  # fmt: skip
