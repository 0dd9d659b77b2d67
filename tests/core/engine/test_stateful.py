"""CacheEngine against a dict: whatever is done to it in whatever order, a load gives what was
stored under exactly these keys, or less of it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import lmcache_core
from lmcache_core import Chunk, ChunkKey, KVLayout, LayerGroup, Namespace, Tensors, unverified

SIZE = 4
LAYOUT = KVLayout(
    groups=(
        LayerGroup(
            kind="attention", layers=(0, 1), kv_heads=1, key_dim=4, value_dim=4, dtype="bfloat16"
        ),
    )
)
NAMESPACES = [
    Namespace(model="toy", layout=LAYOUT, weights=unverified("one")),
    Namespace(model="toy", layout=LAYOUT, weights=unverified("two")),
]
PROMPTS = [[0, *range(1, 6 * SIZE)], [9, *range(1, 6 * SIZE)], [*range(3 * SIZE), *[7] * 9]]
"""The second shares nothing with the first, the third its first three chunks."""

prompts = st.sampled_from(PROMPTS)
namespaces = st.sampled_from(NAMESPACES)


def content(key: ChunkKey, name: str, like: torch.Tensor) -> torch.Tensor:
    """The KV that the chunk `key` has here: another one for each key."""
    seed = int.from_bytes(key[-6:], "little") + len(name)
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


class Engine(RuleBasedStateMachine):
    """An engine over memory (small or large) and a disk, and the dict that it is compared with."""

    @initialize(memory=st.sampled_from(["4KiB", "1MiB"]), disk=st.sampled_from(["8KiB", "1MiB"]))
    def begin(self, memory: str, disk: str) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.stored: set[ChunkKey] = set()
        """Every key that was ever stored."""
        self.large = (memory, disk) == ("1MiB", "1MiB")
        """Whether nothing is ever evicted."""
        self.touched = False
        """Whether anybody changed files behind the engine's back."""
        self.config = {
            "chunk_size": SIZE,
            "tiers": [
                {"backend": "local_cpu", "capacity": memory},
                {"backend": "disk", "path": str(self.folder / "kv"), "capacity": disk},
            ],
        }
        self.cache = lmcache_core.open(self.config)

    @rule(namespace=namespaces, prompt=prompts, chunks=st.integers(1, 6), start=st.integers(0, 6))
    def store(self, namespace: Namespace, prompt: list[int], chunks: int, start: int) -> None:
        keys = namespace.keys(prompt[: chunks * SIZE], SIZE)
        start = min(start, self.cache.lookup(keys).chunks)

        def gather(index: int, out: Tensors) -> None:
            for name, tensor in out.items():
                tensor.copy_(content(keys[index], name, tensor))

        self.cache.store(namespace, keys, gather, start=start)
        self.stored.update(keys[start:])

    @rule(namespace=namespaces, prompt=prompts)
    def load(self, namespace: Namespace, prompt: list[int]) -> None:
        keys = namespace.keys(prompt, SIZE)
        count = sum(self.is_right(chunk, keys) for chunk in self.cache.load(keys))
        assert count <= self.most(keys)
        if self.large and not self.touched:
            assert count == self.most(keys)

    @rule(namespace=namespaces, prompt=prompts, chunks=st.integers(0, 6))
    def begin_a_load_and_leave_it(
        self, namespace: Namespace, prompt: list[int], chunks: int
    ) -> None:
        keys = namespace.keys(prompt, SIZE)
        for chunk, _ in zip(self.cache.load(keys), range(chunks), strict=False):
            self.is_right(chunk, keys)

    @rule(namespace=namespaces, prompt=prompts)
    def look_up(self, namespace: Namespace, prompt: list[int]) -> None:
        keys = namespace.keys(prompt, SIZE)
        found = self.cache.lookup(keys).chunks
        assert found <= self.most(keys)
        if self.large and not self.touched:
            assert found == self.most(keys)

    @rule()
    def flush(self) -> None:
        assert self.cache.flush(20)

    @rule()
    def reopen(self) -> None:
        self.cache.close()
        self.cache = lmcache_core.open(self.config)

    @rule(number=st.integers(0, 20), offset=st.integers(0, 2000))
    def damage(self, number: int, offset: int) -> None:
        files = self.files()
        if not files:
            return
        file = files[number % len(files)]
        data = bytearray(file.read_bytes() or b"\0")
        data[offset % len(data)] ^= 0x10
        file.write_bytes(data)
        self.touched = True

    @rule(number=st.integers(0, 20), kept=st.integers(0, 100))
    def cut(self, number: int, kept: int) -> None:
        files = self.files()
        if files:
            file = files[number % len(files)]
            file.write_bytes(file.read_bytes()[:kept])
            self.touched = True

    @rule(number=st.integers(0, 20), other=st.integers(0, 20))
    def swap(self, number: int, other: int) -> None:
        """One chunk's file under another's name."""
        files = self.files()
        if files:
            data = files[number % len(files)].read_bytes()
            files[other % len(files)].write_bytes(data)
            self.touched = True

    @rule(number=st.integers(0, 20))
    def remove(self, number: int) -> None:
        files = self.files()
        if files:
            files[number % len(files)].unlink()
            self.touched = True

    def files(self) -> list[Path]:
        self.cache.flush(20)
        found = (file for file in self.folder.rglob("*") if len(file.name) == 64)
        return sorted(file for file in found if file.is_file())

    def most(self, keys: list[ChunkKey]) -> int:
        """Chunks of the longest prefix of `keys` that was ever stored."""
        return next((n for n, key in enumerate(keys) if key not in self.stored), len(keys))

    def is_right(self, chunk: Chunk, keys: list[ChunkKey]) -> bool:
        assert chunk.key == keys[chunk.index]
        for name, tensor in chunk.tensors.items():
            assert torch.equal(tensor, content(chunk.key, name, tensor))
        return True

    @invariant()
    def every_tier_is_in_use(self) -> None:
        if hasattr(self, "cache"):
            assert not any(self.cache.bypassed(n) for n in range(2))

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            shutil.rmtree(self.folder)


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
