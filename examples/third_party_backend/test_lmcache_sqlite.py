"""The backend passes the same suite as the built-in ones: pip install -e . && pytest."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from lmcache_sqlite import SqliteBackend, SqliteOptions

from lmcache_core import ChunkKey
from lmcache_core.backend import StorageBackend
from lmcache_core.testing import BackendConformance


class RawFile:
    """The file through a connection of our own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, statement: str, *values: bytes) -> list[tuple[bytes, ...]]:
        db = sqlite3.connect(self.path)
        try:
            with db:
                return db.execute(statement, values).fetchall()
        finally:
            db.close()

    def read(self, key: ChunkKey) -> bytes | None:
        rows = self.run("SELECT frame FROM frames WHERE key = ?", bytes(key))
        return rows[0][0] if rows else None

    def write(self, key: ChunkKey, value: bytes) -> None:
        self.run("INSERT OR REPLACE INTO frames VALUES (?, ?)", bytes(key), value)

    def keys(self) -> set[ChunkKey]:
        return {ChunkKey(key) for (key,) in self.run("SELECT key FROM frames")}


class TestSqlite(BackendConformance):
    persistent = shared = True

    @pytest.fixture
    def open_backend(self, tmp_path: Path) -> Callable[[], StorageBackend]:
        return functools.partial(SqliteBackend, SqliteOptions(path=tmp_path / "kv.sqlite"))

    @pytest.fixture
    def raw(self, tmp_path: Path) -> RawFile:
        return RawFile(tmp_path / "kv.sqlite")
