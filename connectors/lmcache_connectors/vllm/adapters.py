"""LoRA adapters: which files a request's KV depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmcache_connectors.vllm.identity import digest


class Adapters:
    """Fingerprints of the LoRA files that requests name: one name with other files shares nothing.

    vLLM keeps an adapter in memory under its number, and reads the files again when it must or is
    told to. Files that changed since the number was first seen may or may not be what it computes
    with.
    """

    def __init__(self) -> None:
        self._seen: dict[int, str] = {}

    def fingerprint(self, lora: Any) -> str | None:
        """Of a request's adapter, "" without one; None where that is not known for sure."""
        if lora is None:
            return ""
        path = Path(lora.lora_path)
        try:  # a name on a hub is no path: who knows what it stands for
            states = [(file.name, *_state(file)) for file in sorted(path.iterdir())]
        except OSError:
            return None
        now = digest([lora.lora_name, str(path), states])
        if getattr(lora, "load_inplace", False):
            self._seen[lora.lora_int_id] = now
        known = self._seen.setdefault(lora.lora_int_id, now)
        return known if known == now else None


def _state(file: Path) -> tuple[int, int]:
    """Changes with a file's content. Raises OSError."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
