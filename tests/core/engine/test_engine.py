"""CacheEngine: what an inference engine sees, whatever the stores do."""

from __future__ import annotations

import gc
import mmap
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

import lmcache_core
from lmcache_backends.disk import DiskBackend
from lmcache_core import Chunk, ChunkKey, ConfigError, KVLayout, Namespace, Tensors, unverified
from lmcache_core.backend import DaemonPool
from lmcache_core.engine import engine
from lmcache_core.engine.engine import CacheEngine
from lmcache_core.frames import frame
from lmcache_core.io.memory import HostBuffers
from lmcache_core.io.transfer import Transfer
from lmcache_core.kv.namespace import FRAME_VERSION
from lmcache_core.testing import make_chunk, tiny_layout
from lmcache_core.testing.frames import forged
from tests.core.conftest import content
from tests.servers import PATIENCE, free_port
from tests.threads import no_more_threads

SIZE = 4
CHUNK_BYTES = 64 * SIZE
FRAME_BYTES = 1024
"""More than a frame of CHUNK_BYTES takes with its head, less than two."""

Gather = Callable[[int, Tensors], None]
IsRight = Callable[[Chunk], bool]


def memory(capacity: int | str = "1MiB") -> dict[str, Any]:
    return {"backend": "local_cpu", "capacity": capacity}


def disk(path: Path, **more: Any) -> dict[str, Any]:
    return {"backend": "disk", "path": str(path), "capacity": "1MiB", **more}


def opened(*tiers: dict[str, Any]) -> CacheEngine:
    return lmcache_core.open({"chunk_size": SIZE, "tiers": list(tiers)})


def sequence(namespace: Namespace, chunks: int, first: int = 0) -> list[ChunkKey]:
    return namespace.keys([first, *range(1, chunks * SIZE)], SIZE)


def loaded(cache: CacheEngine, keys: Sequence[ChunkKey], is_right: IsRight) -> int:
    """How many chunks a load brings, each of them checked."""
    count = 0
    for chunk in cache.load(keys):
        assert chunk.index == count
        assert chunk.key == keys[count]
        assert is_right(chunk)
        count += 1
    return count


def missed(cache: CacheEngine) -> dict[str, int]:
    """Missed chunks by reason."""
    stats = cache.stats()
    return {labels[1]: n for labels, n in stats.items() if labels[0] == "missed"}


def dropped(cache: CacheEngine) -> dict[str, int]:
    stats = cache.stats()
    return {labels[1]: n for labels, n in stats.items() if labels[0] == "dropped"}


def chunk_file(path: Path, key: ChunkKey) -> Path:
    return next(path.glob(f"chunks/*/{key}"))


# The main job


def test_what_was_stored_comes_back(
    namespace: Namespace, gather: Gather, is_right: IsRight
) -> None:
    with opened(memory()) as cache:
        keys = sequence(namespace, 5)
        assert cache.store(namespace, keys, gather) == 5
        assert cache.lookup(keys).chunks == 5
        assert loaded(cache, keys, is_right) == 5
        assert loaded(cache, [*keys[:3], *sequence(namespace, 5, first=9)[3:]], is_right) == 3


def test_a_new_process_finds_what_is_on_disk(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path
) -> None:
    keys = sequence(namespace, 5)
    with opened(memory(), disk(tmp_path)) as cache:
        cache.store(namespace, keys, gather)  # close() writes what it promised
    with opened(memory(), disk(tmp_path)) as cache:
        assert cache.lookup(keys).tiers == (1,) * 5
        assert loaded(cache, keys, is_right) == 5
        assert cache.lookup(keys).tiers == (0,) * 5  # promoted
        assert loaded(cache, keys, is_right) == 5


def test_only_what_is_missing_is_gathered(namespace: Namespace, gather: Gather) -> None:
    asked: list[int] = []

    def note(index: int, out: Tensors) -> None:
        asked.append(index)
        gather(index, out)

    with opened(memory()) as cache:
        keys = sequence(namespace, 5)
        cache.store(namespace, keys[:2], note)
        cache.store(namespace, keys, note)
        cache.store(namespace, keys, note, start=4)
    assert asked == [0, 1, 2, 3, 4]


def test_a_prefix_over_the_union_of_tiers_counts(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path
) -> None:
    """Chunk 0 in memory, chunk 1 only on disk, chunk 2 in memory: a hit of three."""
    with opened(memory(), disk(tmp_path)) as cache:
        keys = sequence(namespace, 3)
        cache.store(namespace, keys, gather)
        cache.flush()
        cache._tiers[0]._backend.delete([keys[1]], Transfer(1.0))
        chunk_file(tmp_path, keys[0]).unlink()
        chunk_file(tmp_path, keys[2]).unlink()
        assert cache.lookup(keys).tiers == (0, 1, 0)
        assert loaded(cache, keys, is_right) == 3


def test_locate_tells_of_each_chunk_where_it_is(
    namespace: Namespace, gather: Gather, tmp_path: Path
) -> None:
    keys = sequence(namespace, 5)
    with opened(disk(tmp_path)) as cache:
        cache.store(namespace, keys[:4], gather)
    with opened(memory(), disk(tmp_path)) as cache:
        for _ in cache.load(keys[:2]):
            pass
        assert cache.locate([keys[4], keys[3], keys[0]]) == [None, 1, 0]
        assert missed(cache) == {}  # nobody wanted them yet
        assert [tier.in_memory for tier in cache.tiers] == [True, False]


def test_what_locate_found_is_not_missed_while_a_tier_is_bypassed(
    namespace: Namespace, gather: Gather, tmp_path: Path, stalled: Stalls
) -> None:
    keys = sequence(namespace, 5)
    with opened(memory(), disk(tmp_path, deadline="50ms")) as cache:
        cache.store(namespace, keys[:2], gather)
        cache.flush()
        stalled.on("contains")
        assert cache.locate([keys[4], keys[1], keys[0]]) == [None, 0, 0]
        assert missed(cache) == {"deadline": 1}
        stalled.off()


def test_write_behind_is_readable_before_it_is_written(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path, stalled: Stalls
) -> None:
    with opened(disk(tmp_path, deadline="10s")) as cache:
        keys = sequence(namespace, 3)
        stalled.on("put")
        cache.store(namespace, keys, gather)
        assert loaded(cache, keys, is_right) == 3
        stalled.off()
        assert cache.flush(10)


def test_a_chunk_that_is_written_while_a_lookup_runs_is_found(
    namespace: Namespace, gather: Gather, tmp_path: Path, stalled: Stalls, monkeypatch: Any
) -> None:
    """It leaves the queue between the look at the queue and the answer of the store."""
    with opened(disk(tmp_path, deadline="10s")) as cache:
        keys = sequence(namespace, 4)
        stalled.on("put")
        cache.store(namespace, keys[:2], gather)
        real, written = DiskBackend.contains, threading.Event()

        def contains(
            self: DiskBackend, asked: Sequence[ChunkKey], transfer: Transfer
        ) -> list[bool]:
            if list(asked) == keys[2:]:
                stalled.off()
                if cache.flush(10):
                    written.set()
            return real(self, asked, transfer)

        monkeypatch.setattr(DiskBackend, "contains", contains)
        assert cache.lookup(keys).chunks == 2
        assert written.is_set()
        assert not dropped(cache)


def test_scheduler_and_worker_are_different_processes(
    namespace: Namespace,
    gather: Gather,
    is_right: IsRight,
    tmp_path: Path,
    processes: ForkServerContext,
) -> None:
    """Keys, hits and namespaces travel; two engines on one directory see each other at once."""
    with opened(disk(tmp_path)) as scheduler:
        keys = sequence(namespace, 4)
        assert scheduler.lookup(keys).chunks == 0
        worker = processes.Process(target=_work, args=(str(tmp_path), namespace, keys))
        worker.start()
        worker.join(60)
        assert worker.exitcode == 0
        assert scheduler.lookup(keys).chunks == 4
        assert loaded(scheduler, keys, is_right) == 4


def _work(path: str, namespace: Namespace, keys: Sequence[ChunkKey]) -> None:
    def fill(index: int, out: Tensors) -> None:
        for name, tensor in content(namespace, index, SIZE).items():
            out[name].copy_(tensor)

    with opened(disk(Path(path))) as cache:
        cache.store(namespace, keys, fill)


def test_loads_and_stores_from_several_threads(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path
) -> None:
    """Memory, queues and the first disk hold a fraction of what is used, so that everything moves
    between the tiers all the time. What a thread holds stays what it was."""
    sequences = [sequence(namespace, 8, first) for first in range(20)]
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        chance, held = random.Random(seed), []
        try:
            for _ in range(150):
                keys = chance.choice(sequences)[: chance.randrange(1, 9)]
                stop = chance.randrange(12)
                for chunk in cache.load(keys):
                    held.append(chunk)
                    if chunk.index == stop:
                        break
                cache.store(namespace, keys, gather, start=chance.choice([0, 0, len(keys) // 2]))
                assert all(is_right(chunk) for chunk in held[-20:])
            assert all(is_right(chunk) for chunk in held)
        except BaseException as error:
            errors.append(error)

    one = disk(tmp_path / "1", capacity=40 * FRAME_BYTES, queue=4 * CHUNK_BYTES, serde=["zstd"])
    two = disk(tmp_path / "2", queue=8 * CHUNK_BYTES)
    with opened(memory(16 * FRAME_BYTES), one, two) as cache:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors


def test_memory_adopts_what_was_gathered_and_hands_it_out(
    namespace: Namespace, gather: Gather
) -> None:
    """Not one byte of KV is copied between the engine's gather and the engine's scatter."""
    gathered: dict[str, int] = {}

    def note(index: int, out: Tensors) -> None:
        gather(index, out)
        gathered.update({f"{index} {name}": t.data_ptr() for name, t in out.items()})

    with opened(memory()) as cache:
        keys = sequence(namespace, 3)
        cache.store(namespace, keys, note)
        handed = {
            f"{chunk.index} {name}": tensor.data_ptr()
            for chunk in cache.load(keys, shared=True)
            for name, tensor in chunk.tensors.items()
        }
    assert handed == gathered


# Pressure


def test_a_load_larger_than_memory_streams_through(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path
) -> None:
    with opened(memory(4 * FRAME_BYTES), disk(tmp_path)) as cache:
        keys = sequence(namespace, 40)
        cache.store(namespace, keys, gather)
        cache.flush()
        assert loaded(cache, keys, is_right) == 40


def test_what_memory_keeps_of_a_sequence_that_is_too_large_is_its_beginning(
    namespace: Namespace, gather: Gather, is_right: IsRight
) -> None:
    with opened(memory(8 * FRAME_BYTES)) as cache:
        old, new = sequence(namespace, 5), sequence(namespace, 40, first=7)
        cache.store(namespace, old, gather)
        stored = cache.store(namespace, new, gather)
        assert 0 < stored < 40
        assert loaded(cache, new, is_right) == stored
        assert loaded(cache, old, is_right) == 5  # it would not fit without them, either
        assert dropped(cache) == {"full": 40 - stored}
        assert ("evicted", "local_cpu") not in cache.stats()


def test_leaves_leave_before_roots(namespace: Namespace, gather: Gather, is_right: IsRight) -> None:
    with opened(memory(8 * FRAME_BYTES)) as cache:
        old = sequence(namespace, 6)
        cache.store(namespace, old, gather)
        room = cache.store(namespace, sequence(namespace, 6, first=7), gather)
        assert room == 6
        kept = cache.lookup(old).chunks
        assert kept > 0
        assert loaded(cache, old, is_right) == kept
        assert missed(cache) == {"absent": (6 - kept) * 2}


def test_a_full_queue_drops_a_tail_and_counts_it(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path, stalled: Stalls
) -> None:
    with opened(disk(tmp_path, queue=4 * CHUNK_BYTES, deadline="10s")) as cache:
        keys = sequence(namespace, 10)
        stalled.on("put")
        began = time.monotonic()
        taken = cache.store(namespace, keys, gather)
        assert time.monotonic() - began < 5  # it did not wait for the store
        assert taken == 4
        assert dropped(cache) == {"queue": 6}
        # What follows a chunk that was dropped could never be found, so it is dropped too.
        assert cache.store(namespace, keys, gather, start=8) == 0
        assert dropped(cache) == {"queue": 6, "hole": 2}
        stalled.off()
        cache.flush(10)
        assert loaded(cache, keys, is_right) == 4
        # ... until it is offered again.
        cache.store(namespace, keys[:8], gather, start=4)
        cache.flush(10)
        assert cache.store(namespace, keys, gather, start=8) == 2
        cache.flush(10)
        assert loaded(cache, keys, is_right) == 10


def test_a_queue_may_block_instead(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path
) -> None:
    with opened(disk(tmp_path, queue=2 * CHUNK_BYTES, when_full="block")) as cache:
        keys = sequence(namespace, 20)
        assert cache.store(namespace, keys, gather) == 20
        cache.flush(10)
        assert loaded(cache, keys, is_right) == 20
        assert not dropped(cache)


def test_what_a_slow_tier_dropped_reaches_it_at_the_next_hit(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path, stalled: Stalls
) -> None:
    with opened(memory(), disk(tmp_path, queue=2 * CHUNK_BYTES, deadline="10s")) as cache:
        keys = sequence(namespace, 4)
        stalled.on("put")
        cache.store(namespace, keys, gather)
        stalled.off()
        cache.flush(10)
        assert len(list(tmp_path.glob("chunks/*/*"))) == 2
        assert loaded(cache, keys, is_right) == 4  # from memory, and offered again
        cache.flush(10)
        assert loaded(cache, keys, is_right) == 4
        cache.flush(10)
        assert len(list(tmp_path.glob("chunks/*/*"))) == 4


# Faults


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data, other: data[:-1], "damaged"),
        (lambda data, other: data[:20], "damaged"),
        (lambda data, other: b"", "damaged"),
        (lambda data, other: data + b"\0", "damaged"),
        (lambda data, other: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "damaged"),
        (lambda data, other: b"GIF89a" + bytes(500), "damaged"),
        (lambda data, other: data[:-CHUNK_BYTES] + other[-CHUNK_BYTES:], "damaged"),
        (lambda data, other: other, "foreign"),
        (lambda data, other: data[:4] + b"\x09\x00" + data[6:], "damaged"),
        (lambda data, other: forged(data, version=FRAME_VERSION + 1), "unreadable"),
    ],
    ids=["cut", "cut in head", "empty", "longer", "bit flip", "foreign file", "swapped body",
         "another chunk", "version's bits", "newer version"],
)  # fmt: skip
def test_a_damaged_chunk_is_a_counted_miss_and_is_stored_anew(
    namespace: Namespace,
    gather: Gather,
    is_right: IsRight,
    tmp_path: Path,
    damage: Callable[[bytes, bytes], bytes],
    reason: str,
) -> None:
    keys = sequence(namespace, 5)
    with opened(disk(tmp_path)) as cache:
        cache.store(namespace, keys, gather)
        cache.flush()
        victim, other = chunk_file(tmp_path, keys[3]), chunk_file(tmp_path, keys[4])
        victim.write_bytes(damage(victim.read_bytes(), other.read_bytes()))
        assert cache.lookup(keys).chunks == 5
        assert loaded(cache, keys, is_right) == 3
        assert missed(cache) == {reason: 1}
        assert cache.lookup(keys).chunks == 3
        cache.store(namespace, keys, gather, start=3)
        cache.flush()
        assert loaded(cache, keys, is_right) == 5


def test_a_damaged_chunk_is_not_waited_for_where_deleting_hangs(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path, stalled: Stalls
) -> None:
    keys, others = sequence(namespace, 6), sequence(namespace, 6, first=9)
    with opened(disk(tmp_path, deadline=PATIENCE)) as cache:
        cache.store(namespace, keys, gather)
        cache.store(namespace, others, gather)
    for key in keys[2:]:
        chunk_file(tmp_path, key).write_bytes(b"broken")
    with opened(disk(tmp_path, deadline="3s")) as cache:
        stalled.on("delete")
        assert loaded(cache, keys, is_right) == 2
        assert eventually(lambda: cache.stats().get(("bypassed", "writes", "disk")) == 1)
        assert not cache.bypassed(0)
        assert loaded(cache, others, is_right) == 6
        stalled.off()


def test_a_damaged_chunk_in_one_tier_comes_from_the_next(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path
) -> None:
    keys = sequence(namespace, 6)
    with opened(disk(tmp_path / "a"), disk(tmp_path / "b")) as cache:
        cache.store(namespace, keys, gather)
        cache.flush()
        for key in keys[1::2]:
            chunk_file(tmp_path / "a", key).write_bytes(b"broken")
        assert loaded(cache, keys, is_right) == 6
        # A thread that reads ahead may find one damaged just when it is asked for again.
        assert eventually(lambda: missed(cache)["damaged"] >= 3)
        assert set(missed(cache)) <= {"damaged", "evicted"}


def test_a_first_load_finds_its_memory_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that the system has yet to give takes longer than what is read into it."""
    mapped: list[int] = []

    def counting(nbytes: int) -> mmap.mmap:
        mapped.append(nbytes)
        return mmap.mmap(-1, nbytes)

    group = tiny_layout().groups[0].model_copy(update={"kv_heads": 1024})
    wide = Namespace(model="wide", layout=KVLayout(groups=(group,)), weights=unverified("w"))
    keys = sequence(wide, 4)
    tier = disk(tmp_path, capacity="64MiB")
    with opened(tier) as cache:
        cache.store(wide, keys, lambda index, out: [tensor.zero_() for tensor in out.values()])
    pool = HostBuffers()
    monkeypatch.setattr("lmcache_core.io.memory._map", counting)
    monkeypatch.setattr("lmcache_core.engine.engine.HOST", pool)
    monkeypatch.setattr("lmcache_core.io.transfer.HOST", pool)
    with opened(memory("64MiB")) as cache:
        cache.warm([wide.layout])
        assert mapped == []
    with opened(tier) as cache:
        cache.warm([wide.layout])
        assert eventually(lambda: not any(t.name == "lmcache-warm" for t in threading.enumerate()))
        ahead = len(mapped)
        assert ahead >= 4
        assert len(list(cache.load(keys))) == 4
        assert len(mapped) == ahead


def test_a_chunk_evicted_since_the_lookup_ends_the_load(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path
) -> None:
    keys = sequence(namespace, 5)
    with opened(disk(tmp_path)) as cache:
        cache.store(namespace, keys, gather)
        cache.flush()
        hit = cache.lookup(keys)
        chunk_file(tmp_path, keys[2]).unlink()
        assert [chunk.index for chunk in cache.load(hit)] == [0, 1]
        assert missed(cache) == {"evicted": 1}


def test_a_store_that_hangs_costs_one_deadline_and_comes_back(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path, stalled: Stalls
) -> None:
    keys = sequence(namespace, 4)
    with opened(disk(tmp_path, deadline=PATIENCE)) as cache:
        cache.store(namespace, keys, gather)
    with opened(disk(tmp_path, deadline="300ms")) as cache:
        stalled.on("contains")
        began = time.monotonic()
        assert cache.lookup(keys).chunks == 0
        assert time.monotonic() - began >= 0.3
        assert missed(cache) == {"deadline": 4}
        assert cache.bypassed(0)
        before = stalled.calls
        assert cache.lookup(keys).chunks == 0  # bypassed: nothing is asked, nothing waits
        assert missed(cache) == {"deadline": 4, "bypassed": 4}
        assert stalled.calls == before or cache._tiers[0]._reads.bypassed
        stalled.off()
        assert eventually(lambda: loaded(cache, keys, is_right) == 4)
        assert not cache.bypassed(0)
        assert cache.stats()["bypassed", "reads", "disk"] == 1
        assert cache.stats()["in_use", "reads", "disk"] == 1


@pytest.mark.parametrize("method", ["contains", "get", "put", "touch", "delete", "close"])
@pytest.mark.parametrize("fault", ["hang", "raise"])
def test_no_fault_of_a_store_reaches_the_engine(
    namespace: Namespace,
    gather: Gather,
    is_right: IsRight,
    tmp_path: Path,
    stalled: Stalls,
    method: str,
    fault: str,
) -> None:
    keys = sequence(namespace, 4)
    with opened(memory(), disk(tmp_path, deadline="50ms")) as cache:
        cache.store(namespace, keys, gather)
        cache.flush()
    with opened(memory(), disk(tmp_path, deadline="50ms")) as cache:
        stalled.on(method, fault)
        for _ in range(4):
            loaded(cache, keys, is_right)
            cache.store(namespace, keys, gather)
            cache.flush(10)
            assert loaded(cache, keys, is_right) == 4  # from memory if from nowhere else
        began = time.monotonic()
    assert time.monotonic() - began < 5
    stalled.off()


def test_a_failing_write_does_not_stop_reads(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path, stalled: Stalls
) -> None:
    with opened(disk(tmp_path)) as cache:
        keys = sequence(namespace, 4)
        cache.store(namespace, keys, gather)
        cache.flush()
        stalled.on("put", "raise")
        for first in range(1, 9):
            cache.store(namespace, sequence(namespace, 2, first), gather)
            cache.flush()
        assert dropped(cache)["error"] >= 3
        assert sum(dropped(cache).values()) == 16
        assert cache.stats()["bypassed", "writes", "disk"] >= 1
        assert loaded(cache, keys, is_right) == 4


def test_what_gather_raises_comes_through_and_earlier_chunks_stay(
    namespace: Namespace, gather: Gather, is_right: IsRight
) -> None:
    def fail_at_2(index: int, out: Tensors) -> None:
        if index == 2:
            raise RuntimeError("engine trouble")
        gather(index, out)

    with opened(memory()) as cache:
        keys = sequence(namespace, 4)
        with pytest.raises(RuntimeError, match="engine trouble"):
            cache.store(namespace, keys, fail_at_2)
        assert loaded(cache, keys, is_right) == 2


def test_an_abandoned_load_leaves_nothing_behind(
    namespace: Namespace, gather: Gather, tmp_path: Path
) -> None:
    keys = sequence(namespace, 30)
    with opened(disk(tmp_path)) as cache:
        cache.store(namespace, keys, gather)
        cache.flush()
        for _ in range(50):
            next(cache.load(keys))
        readers = cache._tiers[0]._readers
        assert eventually(lambda: readers._idle == len(readers._threads))


def test_loads_that_are_put_aside_keep_no_others_waiting(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path
) -> None:
    keys = sequence(namespace, 30)
    with opened(disk(tmp_path, deadline=PATIENCE)) as cache:
        cache.store(namespace, keys, gather)
        cache.flush()
        aside = [cache.load(keys) for _ in range(40)]
        for load in aside:
            assert next(load).index == 0
        began = time.monotonic()
        assert loaded(cache, keys, is_right) == 30
        assert time.monotonic() - began < PATIENCE
        for load in aside:
            assert sum(1 for _ in load) == 29


# A process that is short of threads


def test_where_no_thread_can_be_had_nothing_is_found_or_taken(
    namespace: Namespace, gather: Gather, tmp_path: Path
) -> None:
    keys = sequence(namespace, 3)
    with no_more_threads(), opened(disk(tmp_path)) as cache:
        for _ in range(5):
            assert cache.lookup(keys).chunks == 0
            assert cache.store(namespace, keys, gather) == 0
            assert cache.flush(5)
        assert missed(cache) == {"error": 15}
        assert dropped(cache) == {"error": 15}
        assert not cache.bypassed(0)  # nothing could find out that it works again


def test_a_load_that_gets_fewer_threads_than_it_wants_leaves_none_behind(
    namespace: Namespace, gather: Gather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = sequence(namespace, 30)
    with opened(disk(tmp_path)) as cache:
        cache.store(namespace, keys, gather)
        cache.flush()
        hit = cache.lookup(keys)
        readers, submit = cache._tiers[0]._readers, DaemonPool.submit

        def one(self: DaemonPool, work: Any) -> Any:
            if self is readers and readers._threads:
                raise RuntimeError("can't start new thread")
            return submit(self, work)

        monkeypatch.setattr(DaemonPool, "submit", one)
        assert list(cache.load(hit)) == []
        assert len(readers._threads) == 1
        assert eventually(lambda: readers._idle == 1)


# Life and death


def test_a_closed_engine_finds_and_stores_nothing(
    namespace: Namespace, gather: Gather, tmp_path: Path
) -> None:
    keys = sequence(namespace, 3)
    cache = opened(memory(), disk(tmp_path))
    cache.store(namespace, keys, gather)
    cache.close()
    cache.close()
    assert cache.lookup(keys).chunks == 0
    assert list(cache.load(keys)) == []
    assert cache.store(namespace, sequence(namespace, 3, first=8), gather) == 0


def test_a_closed_engine_does_not_find_what_a_hung_store_never_took(
    namespace: Namespace,
    gather: Gather,
    tmp_path: Path,
    stalled: Stalls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "DRAIN_SECONDS", 0.2)
    keys = sequence(namespace, 3)
    cache = opened(disk(tmp_path, deadline=PATIENCE))
    stalled.on("put")
    cache.store(namespace, keys, gather)
    assert cache.lookup(keys).chunks == 3
    cache.close()
    assert cache.lookup(keys).chunks == 0
    assert list(cache.load(keys)) == []
    stalled.off()


def test_an_engine_that_nobody_closes_keeps_its_promise(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path
) -> None:
    keys = sequence(namespace, 20)
    cache = opened(disk(tmp_path))
    cache.store(namespace, keys, gather)
    del cache
    with opened(disk(tmp_path)) as cache:
        assert loaded(cache, keys, is_right) == 20


def test_an_interpreter_that_just_ends_keeps_its_promise(
    namespace: Namespace, is_right: IsRight, tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.core.engine.test_engine import *\n"
        "from lmcache_core import Namespace\n"
        "ns = Namespace.from_document(bytes.fromhex(sys.argv[2]))\n"
        "cache = opened(disk(Path(sys.argv[1])))\n"
        "cache.store(ns, sequence(ns, 20), lambda i, out: [out[n].copy_(t) for n, t in"
        " content(ns, i, SIZE).items()])"
    )
    command = [sys.executable, "-c", program, str(tmp_path), namespace.document.hex()]
    subprocess.run(command, check=True, timeout=60)
    with opened(disk(tmp_path)) as cache:
        assert loaded(cache, sequence(namespace, 20), is_right) == 20


def test_an_interpreter_ends_while_a_store_hangs(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tests.core.engine.test_engine import *\n"
        "DiskBackend.contains = lambda *a: time.sleep(600)\n"
        "cache = opened(disk(Path(sys.argv[1]), deadline='100ms'))\n"
        "assert cache.lookup([ChunkKey(bytes(32))]).chunks == 0"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
    assert time.monotonic() - began < 30


def test_loads_that_nobody_finishes_are_collected_in_peace(
    namespace: Namespace, gather: Gather, is_right: IsRight, tmp_path: Path
) -> None:
    """Their ends run wherever the collector happens to, inside any of our locks."""
    with opened(memory(), disk(tmp_path)) as cache:
        keys = sequence(namespace, 6)
        cache.store(namespace, keys, gather)
        cache.flush()
        threshold = gc.get_threshold()
        gc.set_threshold(5)
        try:
            for _ in range(300):
                cycle: list[Any] = [cache.load(keys)]
                next(cycle[0])
                cycle.append(cycle)
                del cycle
                cache.store(namespace, keys, gather)
        finally:
            gc.set_threshold(*threshold)
        assert loaded(cache, keys, is_right) == 6


# Bad calls


def test_a_tier_smaller_than_one_chunk_is_named(tmp_path: Path, namespace: Namespace) -> None:
    with opened(memory(100)) as cache, pytest.raises(ConfigError, match=r"tiers\[0\]\.capacity"):
        cache.namespace(model="m", layout=namespace.layout, weights=unverified("w"))


def test_keys_of_another_namespace_are_refused(namespace: Namespace, gather: Gather) -> None:
    other = namespace.model_copy(update={"model": "other"})
    with opened(memory()) as cache, pytest.raises(ValueError, match="another namespace"):
        cache.store(other, sequence(namespace, 3), gather)


def test_an_empty_sequence_is_fine(namespace: Namespace, gather: Gather, tmp_path: Path) -> None:
    with opened(memory(), disk(tmp_path)) as cache:
        assert cache.lookup([]).chunks == 0
        assert list(cache.load([])) == []
        assert cache.store(namespace, [], gather) == 0


# Stalls: a real disk backend whose methods can be made to hang or raise


class Stalls:
    """Switches for every DiskBackend of a test."""

    def __init__(self) -> None:
        self.method, self.fault = "", ""
        self.go = threading.Event()
        self.calls = 0

    def on(self, method: str, fault: str = "hang") -> None:
        self.go.clear()
        self.method, self.fault = method, fault

    def off(self) -> None:
        self.method = ""
        self.go.set()

    def at(self, method: str) -> None:
        if method == self.method or (method == "ping" and self.method):
            self.calls += 1
            if self.fault == "raise":
                raise OSError("injected")
            self.go.wait(30)


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stalls]:
    stalls = Stalls()
    for method in ("contains", "put", "touch", "delete", "close", "ping"):
        monkeypatch.setattr(DiskBackend, method, _stalling(stalls, method))
    original = DiskBackend.get

    def get(self: DiskBackend, *args: Any) -> Iterator[Any]:
        stalls.at("get")
        yield from original(self, *args)

    monkeypatch.setattr(DiskBackend, "get", get)
    yield stalls
    stalls.off()


def _stalling(stalls: Stalls, method: str) -> Callable[..., Any]:
    original = getattr(DiskBackend, method)

    def call(self: DiskBackend, *args: Any) -> Any:
        stalls.at(method)
        return original(self, *args)

    return call


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_chunks_of_a_batch_are_encoded_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = tiny_layout()
    chunks = [make_chunk(layout, SIZE, index, seed=index) for index in range(4)]
    pair, encode = threading.Barrier(2, timeout=10), frame.encode

    def encode_beside_another(*args: Any) -> list[memoryview]:
        pair.wait()
        return encode(*args)

    with opened(disk(tmp_path, serde=["zstd"])) as cache:
        monkeypatch.setattr(frame, "encode", encode_beside_another)
        keys = [chunk.key for chunk in chunks]
        assert cache._tiers[0]._put(chunks, keys, cache._tiers[0]._transfer()) == 4
        for chunk, original in zip(cache.load(keys), chunks, strict=True):
            assert all(torch.equal(t, original.tensors[n]) for n, t in chunk.tensors.items())


def test_a_chunk_that_cannot_be_encoded_fails_its_batch_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = tiny_layout()
    chunks = [make_chunk(layout, SIZE, index, seed=index) for index in range(4)]
    keys = [chunk.key for chunk in chunks]
    encode = frame.encode

    def encode_all_but_one(chunk: Chunk, *args: Any) -> list[memoryview]:
        if chunk.index == 2:
            raise ValueError("not this one")
        return encode(chunk, *args)

    with opened(disk(tmp_path)) as cache:
        monkeypatch.setattr(frame, "encode", encode_all_but_one)
        assert cache._tiers[0]._write(chunks, keys) == 0
        monkeypatch.setattr(frame, "encode", encode)
        assert cache._tiers[0]._write(chunks, keys) == 4


def test_a_strict_config_wants_stores_that_answer(tmp_path: Path) -> None:
    port = free_port()
    tiers = [disk(tmp_path), {"backend": "redis", "url": f"redis://127.0.0.1:{port}"}]
    with lmcache_core.open({"tiers": tiers}) as cache:
        assert cache.lookup([]).chunks == 0
    with pytest.raises(ConfigError, match=rf"tiers\[1\]: does not answer: .*{port}"):
        lmcache_core.open({"tiers": tiers, "strict": True})
