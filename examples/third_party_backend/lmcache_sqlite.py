"""A third party's backend, whole: frames in an SQLite file.

tiers:
  - backend: sqlite
    path: /var/cache/kv.sqlite
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmcache_core.backend import (
    Buffers,
    ChunkKey,
    ConfigError,
    Options,
    StorageBackend,
    Stored,
    Transfer,
)


class SqliteOptions(Options):
    """`path`: the file, created when missing."""

    path: Path

    def identity(self) -> str:
        """Two tiers on one file are a config error."""
        return str(self.path.resolve())


class SqliteBackend(StorageBackend):
    """One row a chunk. Processes may share the file."""

    Options = SqliteOptions

    def __init__(self, options: SqliteOptions) -> None:
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(options.path, check_same_thread=False, timeout=30)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS frames (key BLOB PRIMARY KEY, frame BLOB)")
        except sqlite3.Error as error:
            raise ConfigError(f"path: {options.path} cannot be used: {error}") from error

    def contains(self, keys: Sequence[ChunkKey], transfer: Transfer) -> list[bool]:
        marks = ",".join("?" * len(keys))
        with self._lock:
            rows = self._db.execute(
                f"SELECT key FROM frames WHERE key IN ({marks})",
                [bytes(key) for key in keys],
            ).fetchall()
        there = {bytes(key) for (key,) in rows}
        return [key in there for key in keys]

    def get(self, keys: Sequence[ChunkKey], transfer: Transfer) -> Iterator[tuple[int, Buffers]]:
        for i, key in enumerate(keys):
            with self._lock:
                row = self._db.execute(
                    "SELECT frame FROM frames WHERE key = ?", (bytes(key),)
                ).fetchone()
            if row is not None:
                yield i, [memoryview(row[0])]  # bytes of our own: nothing to copy
            del row

    def put(
        self,
        frames: Sequence[tuple[ChunkKey, Buffers]],
        prefix: Sequence[ChunkKey],
        transfer: Transfer,
    ) -> int:
        rows = [(bytes(key), b"".join(parts)) for key, parts in frames]
        with self._lock, self._db:  # one transaction: all of them or none
            self._db.executemany("INSERT OR IGNORE INTO frames VALUES (?, ?)", rows)
        return len(frames)

    def delete(self, keys: Sequence[ChunkKey], transfer: Transfer) -> None:
        with self._lock, self._db:
            self._db.executemany(
                "DELETE FROM frames WHERE key = ?", [(bytes(key),) for key in keys]
            )

    def scan(self, transfer: Transfer) -> Iterator[Stored]:
        with self._lock:
            rows = self._db.execute("SELECT key, length(frame) FROM frames").fetchall()
        for key, nbytes in rows:
            yield Stored(ChunkKey(key), nbytes)

    def close(self) -> None:
        with self._lock:
            self._db.close()
