"""shm: the conformance suite, and what only a pool of processes can suffer.

LMCACHE_SHM_SECONDS=600 makes the test that kills workers at random run for that long, and those
that kill at a line do so at every line instead of every seventh, as one of them always does.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import hashlib
import mmap
import multiprocessing
import os
import random
import resource
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import lmcache_core
from lmcache_backends.shm import main
from lmcache_backends.shm import segment as _segment
from lmcache_backends.shm.backend import FREE, GONE, RESERVED, WHOLE, ShmBackend, ShmOptions
from lmcache_core import ChunkKey, ConfigError, KVLayout, LayerGroup, unverified
from lmcache_core.backend import StorageBackend, Transfer
from lmcache_core.errors import DeadlineExceeded, StorageError
from lmcache_core.testing import SMALL, BackendConformance, no_leaks
from tests.backends.frames import Into, scan
from tests.system import as_user, masked_by, needs_root

EVICTED: list[bytes] = []
"""Keys that `put` made leave, since somebody looked."""
GIB = 1 << 30
MIB = 1 << 20
PAGE = 4096
SECONDS = float(os.environ.get("LMCACHE_SHM_SECONDS", "12"))


@pytest.fixture
def pool() -> Iterator[str]:
    names = [f"test-{os.getpid()}-{secrets.token_hex(4)}"]
    yield names[0]
    for path in Path("/dev/shm").glob(f"lmcache-{os.getuid()}-{names[0]}*"):
        path.unlink()


def opener(pool: str, capacity: int = 256 * MIB) -> Callable[[], ShmBackend]:
    return functools.partial(ShmBackend, ShmOptions(capacity=capacity, pool=pool))


class RawPool:
    """The segment, by the layout that `_segment` documents and its first page tells."""

    NAMES = ("state", "owner", "taken", "members", "index", "keys", "start", "nbytes", "first",
             "pages", "used", "leases", "data")  # fmt: skip

    def __init__(self, pool: str) -> None:
        self.path = Path(f"/dev/shm/lmcache-{os.getuid()}-{pool}")

    def __call__(self, name: str, row: int, nbytes: int = 0) -> bytes:
        with self.path.open("rb", 0) as file:
            return os.pread(file.fileno(), nbytes or self.width(name), self.at(name, row))

    def width(self, name: str) -> int:
        return {"keys": 32, "start": 8, "nbytes": 8, "first": 8, "pages": 8}.get(name, 1)

    def word(self, number: int) -> int:
        with self.path.open("rb", 0) as file:
            return int.from_bytes(os.pread(file.fileno(), 8, 8 * number), "little")

    def at(self, name: str, row: int) -> int:
        return self.word(16 + self.NAMES.index(name)) + row * self.width(name)

    def number(self, name: str, row: int) -> int:
        return int.from_bytes(self(name, row), "little")

    def slots(self, state: int) -> list[int]:
        states = self("state", 0, self.word(4))
        return [slot for slot, value in enumerate(states) if value == state]

    def read(self, key: ChunkKey) -> bytes | None:
        for slot in self.slots(WHOLE):
            if self("keys", slot) == key:
                nbytes = self.number("nbytes", slot)
                return self("data", self.number("start", slot), nbytes) if nbytes else b""
        return None

    def keys(self) -> set[ChunkKey]:
        return {ChunkKey(self("keys", slot)) for slot in self.slots(WHOLE)}

    def write(self, key: ChunkKey, value: bytes) -> None:
        """A slot and its pages, as one who dies before the index knows of them leaves them."""
        slot = self.slots(FREE)[-1]
        pages = max(1, -(-len(value) // PAGE))
        free = self("taken", 0, self.word(5)).find(bytes(pages))
        with self.path.open("rb+", 0) as file:
            fields = {"start": free * PAGE, "nbytes": len(value), "first": free, "pages": pages}
            for name, number in fields.items():
                os.pwrite(file.fileno(), number.to_bytes(8, "little"), self.at(name, slot))
            os.pwrite(file.fileno(), key, self.at("keys", slot))
            os.pwrite(file.fileno(), value, self.at("data", free * PAGE))
            os.pwrite(file.fileno(), bytes([WHOLE]), self.at("state", slot))
            os.pwrite(file.fileno(), b"\1", 8 * 6)


class TestShm(BackendConformance):
    persistent = shared = bounded = True

    @pytest.fixture
    def raw(self, pool: str) -> RawPool:
        return RawPool(pool)

    @pytest.fixture
    def open_backend(self, pool: str) -> Callable[[], StorageBackend]:
        return opener(pool)

    @pytest.fixture
    def open_small(self, pool: str) -> Callable[[], StorageBackend]:
        return opener(pool, SMALL)


def key(number: int) -> ChunkKey:
    return ChunkKey(hashlib.sha256(b"%d" % number).digest())


def value(number: int, nbytes: int) -> bytes:
    return (hashlib.sha256(b"value %d" % number).digest() * (nbytes // 32 + 1))[:nbytes]


def put(backend: ShmBackend, number: int, nbytes: int = 5000) -> int:
    parts = [memoryview(value(number, nbytes))]
    transfer = Transfer(5.0)
    stored = backend.put([(key(number), parts)], [key(number)], transfer)
    EVICTED.extend(transfer.evicted)
    return stored


def get(backend: ShmBackend, number: int) -> memoryview | None:
    for _, (view,) in backend.get([key(number)], Into(5.0, lambda n: pytest.fail("no buffer"))):
        return view
    return None


def check(backend: ShmBackend) -> None:
    """All that is derived must follow from the slots."""
    pool = backend._pool
    segment, words = pool._segment, pool._words
    pool._hold(Transfer(5.0), pool._reap, changing=True)
    live = np.flatnonzero(segment.state != FREE)
    taken = np.zeros_like(segment.taken, dtype=np.int64)
    for slot in live:
        taken[segment.first[slot] : segment.first[slot] + segment.pages[slot]] += 1
    assert taken.max(initial=0) <= 1  # no page is two slots'
    assert (taken == segment.taken).all()
    assert words[_segment.Word.FREE] == (taken == 0).sum()
    longest = max(map(len, bytes(segment.taken).split(b"\1")))
    assert words[_segment.Word.LONGEST] >= longest
    whole = set(np.flatnonzero(segment.state == WHOLE))
    assert sorted(segment.index[segment.index > 0]) == sorted(whole)
    keys = [ChunkKey(segment.keys[slot].tobytes()) for slot in whole]
    assert set(pool._find(keys)) == whole  # each is found, and only once
    assert not words[_segment.Word.DIRTY]


@pytest.fixture
def backend(pool: str) -> Iterator[ShmBackend]:
    with no_leaks():
        backend = opener(pool)()
        yield backend
        check(backend)
        backend.close()
        del backend


# Opening


def test_the_file_is_the_users_own_and_stays_when_all_have_left(pool: str) -> None:
    backend = opener(pool)()
    put(backend, 1)
    backend.close()
    status = RawPool(pool).path.stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_blocks * 512 >= 256 * MIB  # every page is there, so none is missing later


def test_another_size_is_refused_and_named(backend: ShmBackend, pool: str) -> None:
    put(backend, 1)
    with pytest.raises(ConfigError, match=r"created with 268435456 bytes, not 1048576; stop its"):
        opener(pool, MIB)()
    assert get(backend, 1) == value(1, 5000)


@pytest.mark.parametrize(
    ("word", "number", "message"),
    [(1, 99, "layout version 99, not 1"), (0, 12345, "is not a pool")],
)
def test_another_layout_is_refused(pool: str, word: int, number: int, message: str) -> None:
    opener(pool, MIB)().close()
    with RawPool(pool).path.open("rb+", 0) as file:
        os.pwrite(file.fileno(), number.to_bytes(8, "little"), 8 * word)
    with no_leaks(), pytest.raises(ConfigError, match=message):
        opener(pool, MIB)()


def test_a_pool_whose_creator_was_killed_is_made_anew(pool: str) -> None:
    path = RawPool(pool).path
    for rest in (b"", bytes(10 * PAGE), bytes(3 * MIB)):
        path.write_bytes(rest)
        path.chmod(0o600)
        backend, other = opener(pool, MIB)(), opener(pool, MIB)()
        assert put(backend, 1) == 1
        assert get(other, 1) == value(1, 5000)
        backend.close()
        other.close()
        path.unlink()


def test_what_others_can_write_to_is_refused(pool: str) -> None:
    opener(pool, MIB)().close()
    RawPool(pool).path.chmod(0o666)
    with pytest.raises(ConfigError, match="is open to other users"):
        opener(pool, MIB)()


def test_a_link_is_not_followed(pool: str, tmp_path: Path) -> None:
    RawPool(pool).path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is not a file; remove it or take another name"):
        opener(pool, MIB)()
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_of_ours_under_a_second_name_is_no_pool(pool: str) -> None:
    precious = RawPool(f"{pool}-precious").path
    precious.write_bytes(bytes(100))
    precious.chmod(0o600)
    RawPool(pool).path.hardlink_to(precious)
    with pytest.raises(ConfigError, match="has a second name"):
        opener(pool, MIB)()
    assert precious.read_bytes() == bytes(100)


@needs_root
@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_a_pool_is_private_whatever_the_umask(pool: str, umask: int) -> None:
    path = Path(f"/dev/shm/lmcache-65534-{pool}")

    def work() -> int:
        with masked_by(umask):
            return put(opener(pool, MIB)(), 1) + put(opener(pool, MIB)(), 2)

    try:
        assert as_user(65534, work) == "2"
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        path.unlink(missing_ok=True)


@needs_root
def test_another_users_file_is_refused_without_waiting_for_its_lock(pool: str) -> None:
    path = RawPool(pool).path
    path.touch()
    os.chown(path, 12345, -1)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(ConfigError, match="belongs to user 12345, not to user 0; remove it"):
            opener(pool, MIB)()
        assert time.monotonic() - began < 5  # and not for as long as it takes to open one's own


def test_more_than_there_is_memory_is_refused_at_once_and_leaves_nothing(pool: str) -> None:
    free = os.statvfs("/dev/shm").f_bavail * PAGE
    with no_leaks(), pytest.raises(ConfigError, match=r"capacity: .* would take .* bytes, and"):
        opener(pool, free * 4)()
    assert not RawPool(pool).path.exists()


@needs_root
def test_another_users_pool_is_refused(pool: str) -> None:
    opener(pool, MIB)().close()
    os.chown(RawPool(pool).path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345, not to user 0; remove it"):
        opener(pool, MIB)()


def test_there_is_a_limit_to_members_and_their_places_are_used_again(pool: str) -> None:
    members = [opener(pool, MIB)() for _ in range(64)]
    with pytest.raises(ConfigError, match="64 members already"):
        opener(pool, MIB)()
    members[7].close()
    again = opener(pool, MIB)()
    assert put(again, 1) == 1
    for member in [*members, again]:
        member.close()


def test_the_name_cannot_lead_elsewhere() -> None:
    for name in ("", "a/b", "../x", "a b", "x" * 65):
        with pytest.raises(ValueError, match="pool"):
            ShmOptions(capacity=MIB, pool=name)


# Reading without copying


def test_a_view_shows_the_shared_pages_themselves(backend: ShmBackend, pool: str) -> None:
    put(backend, 1)
    view = get(backend, 1)
    raw = RawPool(pool)
    (slot,) = raw.slots(WHOLE)
    with raw.path.open("rb+", 0) as file:
        os.pwrite(file.fileno(), b"!", raw.at("data", raw.number("start", slot)))
    assert view[:1] == b"!"
    assert view.readonly


def test_pages_are_mapped_before_a_load_touches_them(pool: str) -> None:
    one, two = opener(pool)(), opener(pool)()
    if tuple(map(int, os.uname().release.split(".")[:2])) < (5, 14):
        pytest.skip("this kernel maps nothing ahead")
    put(one, 1, 8 * MIB)
    end = time.monotonic() + 30
    while any(thread.name == "lmcache-shm-map" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)
    pages = np.asarray(get(two, 1))[::PAGE]
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    assert pages.any()
    assert pages.sum() > 0
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 16  # 128 at 64 KiB each
    del pages
    one.close()
    two.close()


def test_what_a_reader_holds_is_not_overwritten(pool: str) -> None:
    one, two = opener(pool, MIB)(), opener(pool, MIB)()
    put(one, 1, MIB // 4)
    array = np.asarray(get(two, 1))
    part = array[1000:2000]
    del array
    assert get(two, 1) is not None  # seen twice, and no longer once
    for number in range(2, 30):
        put(one, number, MIB // 4)
    assert one.contains([key(1)], Transfer(1.0)) == [True]
    one.delete([key(1)], Transfer(1.0))
    for number in range(30, 60):
        put(one, number, MIB // 4)
    assert part.tobytes() == value(1, MIB // 4)[1000:2000]
    assert len(scan(one)) == 3
    del part
    for number in range(60, 70):
        put(one, number, MIB // 4)
    assert len(scan(one)) == 4
    check(one)
    one.close()
    two.close()


def test_a_reader_that_has_closed_still_reads(pool: str) -> None:
    one, two = opener(pool, MIB)(), opener(pool, MIB)()
    with no_leaks():
        put(one, 1, MIB // 2)
        reader = opener(pool, MIB)()
        view = get(reader, 1)
        reader.close()
        for number in range(2, 9):
            put(two, number, MIB // 2)
        assert view == value(1, MIB // 2)
        del view, reader
    one.close()
    two.close()


def test_what_is_held_everywhere_leaves_no_room(pool: str) -> None:
    backend = opener(pool, MIB)()
    assert [put(backend, number, MIB // 4) for number in range(4)] == [1] * 4
    held = [get(backend, number) for number in range(4)]
    assert put(backend, 9, MIB // 4) == 0
    assert backend.contains([key(n) for n in range(4)], Transfer(1.0)) == [True] * 4
    held.pop()
    assert put(backend, 9, MIB // 4) == 1
    backend.close()


def test_views_may_die_on_any_thread_and_in_cycles(backend: ShmBackend) -> None:
    for number in range(8):
        put(backend, number)

    def work() -> None:
        for n in range(300):
            cycle: list[object] = [get(backend, n % 8), get(backend, (n + 1) % 8)]
            cycle.append(cycle)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    backend._pool._leases.settle()
    assert not backend._pool._segment.leases.any()
    assert not backend._pool._leases._views


# Room


def test_a_payload_in_room_of_the_pool_is_published_where_it_lies(backend: ShmBackend) -> None:
    room = backend.reserve(10_000, [key(1)], Transfer(1.0))
    room[:] = value(1, 10_000)
    head = bytes(range(64)) * 3
    before = bytes(room)
    where = np.frombuffer(room, np.uint8).ctypes.data
    assert backend.contains([key(1)], Transfer(1.0)) == [False]
    assert backend.put([(key(1), [memoryview(head), room])], [key(1)], Transfer(1.0)) == 1
    view = get(backend, 1)
    assert view == head + before
    assert np.frombuffer(view, np.uint8).ctypes.data == where - len(head)
    del room, view
    assert len(backend._pool._segment.state.nonzero()[0]) == 1


def test_room_that_is_given_up_is_taken_back(pool: str) -> None:
    backend = opener(pool, MIB)()
    for _ in range(20):
        assert backend.reserve(MIB - PAGE, [], Transfer(1.0)) is not None
    held = backend.reserve(MIB - PAGE, [], Transfer(1.0))
    assert backend.reserve(1, [], Transfer(1.0)) is None
    del held
    assert put(backend, 1, MIB) == 1
    backend.close()


def test_a_head_larger_than_the_space_before_it_is_copied_with_its_payload(
    backend: ShmBackend,
) -> None:
    room = backend.reserve(5000, [key(1)], Transfer(1.0))
    room[:] = value(1, 5000)
    head = bytes(PAGE + 64)
    backend.put([(key(1), [memoryview(head), room])], [key(1)], Transfer(1.0))
    assert get(backend, 1) == head + value(1, 5000)
    del room


def test_a_part_of_a_room_is_stored_as_that_part(backend: ShmBackend) -> None:
    room = backend.reserve(10_000, [key(1)], Transfer(1.0))
    room[:] = value(1, 10_000)
    backend.put([(key(1), [memoryview(b"head"), room[:5000]])], [key(1)], Transfer(1.0))
    assert get(backend, 1) == b"head" + value(1, 5000)
    del room


def test_two_who_store_the_same_keep_one(pool: str) -> None:
    one, two = opener(pool)(), opener(pool)()
    rooms = [one.reserve(5000, [key(1)], Transfer(1.0)), two.reserve(5000, [key(1)], Transfer(1.0))]
    for backend, room, byte in zip((one, two), rooms, b"12", strict=True):
        room[:] = bytes([byte]) * 5000
        assert backend.put([(key(1), [memoryview(b"head"), room])], [key(1)], Transfer(1.0)) == 1
    assert get(one, 1) == b"head" + b"1" * 5000
    assert len(scan(two)) == 1
    del rooms, room
    check(one)
    check(two)
    assert len(RawPool(pool).slots(WHOLE)) == 1
    assert not RawPool(pool).slots(RESERVED) + RawPool(pool).slots(GONE)
    one.close()
    two.close()


def test_frames_of_all_sizes_fill_most_of_the_pool(pool: str) -> None:
    """Random sizes over a factor of 64 with old ones leaving for weeks: space is not lost."""
    backend = opener(pool, 16 * MIB)()
    chance = random.Random(5)
    for number in range(1500):
        assert put(backend, number, int(8192 * 64 ** chance.random())) == 1
    stored = sum(stored.nbytes for stored in scan(backend))
    assert stored > 0.75 * 16 * MIB
    check(backend)
    backend.close()


def test_one_large_frame_displaces_the_neighbours_that_are_least_in_use(pool: str) -> None:
    backend = opener(pool, MIB)()
    for number in range(64):
        put(backend, number, MIB // 64)
    backend.touch([key(n) for n in chance_order(64)], Transfer(1.0))
    assert put(backend, 99, MIB // 2) == 1
    assert len(scan(backend)) >= 64 - 32 - 64 + 1
    assert get(backend, 99) == value(99, MIB // 2)
    check(backend)
    backend.close()


def chance_order(count: int) -> list[int]:
    return random.Random(1).sample(range(count), count)


def evicting(pool: str, before: int) -> tuple[ShmBackend, list[bytes]]:
    """A pool that has room for four chunks and has some, and what it evicts from now on."""
    backend = opener(pool, MIB)()
    for number in range(before):
        put(backend, number, MIB // 4)
    EVICTED.clear()
    return backend, EVICTED


def put_behind(backend: ShmBackend, *chain: int) -> None:
    """Store the last of a sequence."""
    parts = [memoryview(value(chain[-1], MIB // 4))]
    keys, transfer = [key(number) for number in chain], Transfer(5.0)
    assert backend.put([(keys[-1], parts)], keys, transfer) == 1
    backend.touch(keys, transfer)
    EVICTED.extend(transfer.evicted)


def test_eviction_passes_over_what_was_used_is_in_the_sequence_or_is_looked_at(pool: str) -> None:
    backend, evicted = evicting(pool, 4)
    put_behind(backend, 10)
    backend.touch([key(1)], Transfer(1.0))
    put_behind(backend, 11)
    put_behind(backend, 3, 12)  # 3 is the oldest now
    view = get(backend, 1)  # as is 1
    put_behind(backend, 13)
    assert evicted == [key(number) for number in (0, 2, 10, 11)]
    del view
    check(backend)
    backend.close()


def test_a_large_chunk_displaces_none_of_its_own_sequence(pool: str) -> None:
    backend, _ = evicting(pool, 4)
    parts = [memoryview(value(20, MIB // 2))]
    transfer = Transfer(5.0)
    assert backend.put([(key(20), parts)], [key(0), key(20)], transfer) == 1
    assert transfer.evicted == [key(1), key(2)]
    backend.close()


def test_what_was_deleted_is_not_evicted_again(pool: str) -> None:
    backend, evicted = evicting(pool, 4)
    put(backend, 10, MIB // 4)
    backend.delete([key(1), key(2)], Transfer(1.0))
    put(backend, 20, MIB // 2)  # in the slot of one, on the pages of both
    put(backend, 21, MIB // 4)
    assert evicted == [key(0), key(3)]
    assert get(backend, 20) == value(20, MIB // 2)
    check(backend)
    backend.close()


def test_a_sequence_that_is_stored_chunk_by_chunk_is_evicted_from_its_end(pool: str) -> None:
    backend, evicted = evicting(pool, 0)
    for length in range(1, 5):
        put_behind(backend, *range(length))
    for number in range(10, 14):
        put_behind(backend, number)
    assert evicted == [key(number) for number in (3, 2, 1, 0)]
    backend.close()


def test_a_sequence_that_grows_later_counts_as_used_from_its_root(pool: str) -> None:
    backend, evicted = evicting(pool, 3)
    backend._pool._segment.used[:] -= 10**9  # a second passes
    put_behind(backend, 0, 3)
    for number in range(10, 14):
        put_behind(backend, number)
    assert evicted == [key(number) for number in (1, 2, 3, 0)]
    backend.close()


def test_slots_run_out_before_bytes_do(pool: str) -> None:
    backend = opener(pool, 8 * MIB)()
    slots = RawPool(pool).word(4)
    EVICTED.clear()
    for number in range(slots + 50):
        assert put(backend, number, 10) == 1
    assert [key(number) for number in range(51)] == EVICTED
    check(backend)
    backend.close()


def test_a_chunk_for_which_the_index_has_no_cell_is_not_there_and_takes_no_room(
    backend: ShmBackend,
) -> None:
    """No two of 16 hashes meet in both buckets by chance; these do on purpose."""
    keys = [ChunkKey(bytes(16) + bytes([1, 0, 0, 0, 0, 0, 0, n] * 2)) for n in range(17)]
    for each in keys:
        backend.put([(each, [memoryview(b"frame")])], [each], Transfer(1.0))
    assert backend.contains(keys, Transfer(1.0)) == [True] * 8 + [False] * 9
    check(backend)
    assert len(backend._pool._segment.state.nonzero()[0]) == 8


def test_the_index_takes_less_than_200_bytes_a_chunk(pool: str) -> None:
    opener(pool)().close()
    raw = RawPool(pool)
    page_map = raw.word(5)
    assert (raw.at("data", 0) - page_map) / raw.word(4) < 200


# Trouble


def test_a_deleted_pool_gives_misses_and_ping_makes_a_new_one(backend: ShmBackend) -> None:
    put(backend, 1)
    view = get(backend, 1)
    os.unlink(backend._pool._segment.path)
    for call in (
        lambda: backend.contains([key(1)], Transfer(1.0)),
        lambda: get(backend, 1),
        lambda: put(backend, 2),
        lambda: backend.touch([key(1)], Transfer(1.0)),
        lambda: backend.delete([key(1)], Transfer(1.0)),
    ):
        with pytest.raises(StorageError, match="was deleted"):
            call()
    assert view == value(1, 5000)
    del view
    backend.ping(Transfer(1.0))
    assert backend.contains([key(1)], Transfer(1.0)) == [False]
    assert put(backend, 1) == 1


def test_a_pool_that_was_cut_gives_misses(pool: str) -> None:
    backend = opener(pool)()
    put(backend, 1)
    view = get(backend, 1)
    os.truncate(RawPool(pool).path, 100)
    with pytest.raises(StorageError, match="was cut to 100 bytes"):
        backend.contains([key(1)], Transfer(1.0))
    with pytest.raises(ConfigError, match=r"not a pool|was cut"):
        backend.ping(Transfer(1.0))
    del view  # which must not touch the pages
    backend.close()


LAYOUT = KVLayout(
    groups=(LayerGroup(kind="attention", layers=(0,), kv_heads=1, key_dim=8, value_dim=8,
                       dtype="float32"),)
)  # fmt: skip


def test_an_engine_gathers_straight_into_the_pages_that_others_load(pool: str) -> None:
    tier = {"backend": "shm", "pool": pool, "capacity": "1MiB"}
    config = {"tiers": [tier], "chunk_size": 16}
    with lmcache_core.open(config) as one, lmcache_core.open(config) as two:
        namespace = one.namespace(model="m", layout=LAYOUT, weights=unverified("test"))
        keys = one.keys(namespace, list(range(64)))
        bases = [c._tiers[0]._backend._pool._segment.whole.ctypes.data for c in (one, two)]
        gathered: list[int] = []

        def gather(index: int, out: lmcache_core.Tensors) -> None:
            gathered.extend(tensor.fill_(index).data_ptr() - bases[0] for tensor in out.values())

        assert one.store(namespace, keys, gather) == 4
        chunks = list(two.load(keys, shared=True))
        loaded = [t.data_ptr() - bases[1] for chunk in chunks for t in chunk.tensors.values()]
        assert loaded == gathered
        assert [float(chunk.tensors["g0.v"].min()) for chunk in chunks] == [0, 1, 2, 3]
        del chunks


def test_what_an_engine_has_loaded_may_leave_the_pool(pool: str) -> None:
    """A private copy above would be none: it would hold the pool's slots for all."""
    shm = {"backend": "shm", "pool": pool, "capacity": "256KiB"}
    above = [{"backend": "local_cpu", "capacity": "1MiB"}, shm]
    with (
        lmcache_core.open({"tiers": [shm], "chunk_size": 16}) as one,
        lmcache_core.open({"tiers": above, "chunk_size": 16}) as two,
    ):
        namespace = one.namespace(model="m", layout=LAYOUT, weights=unverified("test"))
        for first in range(200):
            keys = one.keys(namespace, [first, *range(1, 64)])
            assert (
                one.store(namespace, keys, lambda index, out: [t.zero_() for t in out.values()])
                == 4
            )
            assert [chunk.index for chunk in two.load(keys)] == [0, 1, 2, 3]
            assert two.lookup(keys).tiers == (1,) * 4


def test_a_gather_that_fails_leaves_nothing(pool: str) -> None:
    tier = {"backend": "shm", "pool": pool, "capacity": "1MiB"}
    with lmcache_core.open({"tiers": [tier], "chunk_size": 16}) as cache:
        namespace = cache.namespace(model="m", layout=LAYOUT, weights=unverified("test"))
        keys = cache.keys(namespace, list(range(64)))

        def gather(index: int, out: lmcache_core.Tensors) -> None:
            if index == 2:
                raise RuntimeError("no")
            for tensor in out.values():
                tensor.fill_(index)

        with pytest.raises(RuntimeError, match="no"):
            cache.store(namespace, keys, gather)
        gc.collect()
        assert cache.lookup(keys).chunks == 2
        check(cache._tiers[0]._backend)
        assert len(RawPool(pool).slots(WHOLE)) == 2
        assert not RawPool(pool).slots(RESERVED) + RawPool(pool).slots(GONE)


def test_the_engine_goes_on_after_its_pool_was_deleted(pool: str) -> None:
    tier = {"backend": "shm", "pool": pool, "capacity": "1MiB"}
    with lmcache_core.open({"tiers": [tier], "chunk_size": 16}) as cache:
        namespace = cache.namespace(model="m", layout=LAYOUT, weights=unverified("test"))
        keys = cache.keys(namespace, list(range(64)))

        def gather(index: int, out: lmcache_core.Tensors) -> None:
            for tensor in out.values():
                tensor.fill_(index)

        assert cache.store(namespace, keys, gather) == 4
        chunks = list(cache.load(keys))
        assert [float(chunk.tensors["g0.k"].max()) for chunk in chunks] == [0, 1, 2, 3]
        RawPool(pool).path.unlink()
        assert cache.lookup(keys).chunks == 0
        end = time.monotonic() + 20
        while not cache.store(namespace, keys, gather) and time.monotonic() < end:
            cache.lookup(keys)
            time.sleep(0.05)
        assert cache.lookup(keys).chunks == 4
        del chunks


def test_a_stopped_holder_of_the_lock_costs_a_deadline_and_stops_no_lookup(
    backend: ShmBackend, pool: str
) -> None:
    put(backend, 1)
    program = (
        "import fcntl, os, sys, time; fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(RawPool(pool).path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    holder.stdout.readline()
    holder.send_signal(signal.SIGSTOP)
    assert backend.contains([key(1), key(2)], Transfer(1.0)) == [True, False]
    with pytest.raises(DeadlineExceeded):
        list(backend.get([key(1)], Into(0.05, lambda n: pytest.fail("no buffer"))))
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert get(backend, 1) == value(1, 5000)


def test_whatever_is_derived_may_be_lost(backend: ShmBackend) -> None:
    for number in range(20):
        put(backend, number)
    backend.delete([key(number) for number in range(0, 20, 3)], Transfer(1.0))
    left = [key(number) for number in range(20) if number % 3]
    room = backend.reserve(5000, [], Transfer(1.0))
    EVICTED.clear()
    segment, words, word = backend._pool._segment, backend._pool._words, _segment.Word
    segment.index[:] = 7
    segment.taken[:] = 1
    words[[word.FREE, word.LONGEST]] = 0
    words[[word.CURSOR, word.LOW]] = words[[word.PAGES, word.SLOTS]]
    words[[word.HIGH, word.DIRTY]] = 1
    assert sorted(stored.key for stored in scan(backend)) == sorted(left)
    assert backend.contains(left, Transfer(1.0)) == [True] * len(left)
    assert put(backend, 50) == 1
    assert not EVICTED
    check(backend)
    del room


def test_what_a_dead_process_was_removing_is_not_found(backend: ShmBackend) -> None:
    put(backend, 1)
    backend._pool._words[_segment.Word.DIRTY] = 1
    backend._pool._segment.state[backend._pool._slot(key(1))] = GONE
    assert backend.contains([key(1)], Transfer(1.0)) == [False]
    assert get(backend, 1) is None


@contextmanager
def held_by_another(pool: str) -> Iterator[None]:
    """The mutex, held by somebody who does not give it back."""
    with RawPool(pool).path.open("rb+", 0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_nothing_is_changed_or_leased_without_the_lock(backend: ShmBackend, pool: str) -> None:
    put(backend, 1)
    room = backend.reserve(5000, [key(2)], Transfer(1.0))
    parts = [memoryview(b"head"), room]
    backend._pool._leases.settle()

    def shared() -> list[bytes]:
        names = ("words", "state", "owner", "taken", "index", "keys", "used", "leases")
        return [getattr(backend._pool._segment, name).tobytes() for name in names]

    before = shared()
    with held_by_another(pool):
        for call in (
            lambda: backend.put([(key(2), parts)], [key(2)], Transfer(0.01)),
            lambda: backend.put([(key(3), [memoryview(b"copied")])], [key(3)], Transfer(0.01)),
            lambda: backend.reserve(5000, [key(4)], Transfer(0.01)),
            lambda: list(backend.get([key(1)], Into(0.01, lambda n: pytest.fail("no buffer")))),
            lambda: backend.delete([key(1)], Transfer(0.01)),
        ):
            with pytest.raises(DeadlineExceeded):
                call()
        assert shared() == before


def test_a_change_that_was_interrupted_is_mended(
    backend: ShmBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as by Ctrl-C, which may be raised anywhere."""

    def interrupted(slot: int) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend._pool, "_enter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            put(backend, 1)
    assert backend.contains([key(1)], Transfer(1.0)) == [True]
    assert get(backend, 1) == value(1, 5000)


def test_a_pool_that_is_removed_while_one_waits_to_join_is_made_anew(pool: str) -> None:
    opener(pool, MIB)().close()
    opened: list[ShmBackend] = []
    with held_by_another(pool):
        thread = threading.Thread(target=lambda: opened.append(opener(pool, MIB)()))
        thread.start()
        time.sleep(0.2)
        RawPool(pool).path.unlink()
    thread.join()
    (backend,) = opened
    assert put(backend, 1) == 1
    backend.close()


def test_a_forked_child_has_no_part_in_its_parents_leases_and_locks(pool: str) -> None:
    backend = opener(pool, MIB)()
    put(backend, 1, MIB // 2)
    view = get(backend, 1)
    child = os.fork()
    if child == 0:
        code = 0
        try:
            backend.contains([key(1)], Transfer(1.0))
            code = 1
        except StorageError:
            view = None
            own = opener(pool, MIB)()
            code = 0 if bytes(get(own, 1)) == value(1, MIB // 2) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    for number in range(2, 6):
        put(backend, number, MIB // 2)
    assert view == value(1, MIB // 2)  # the child's copy of the view ended no lease
    ready, started = os.pipe()
    sleeper = os.fork()
    if sleeper == 0:
        os.write(started, b"x")
        time.sleep(30)
        os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(started)
    del view
    member = backend._pool._member
    backend.close()
    other = opener(pool, MIB)()
    os.kill(sleeper, signal.SIGKILL)
    os.waitpid(sleeper, 0)
    assert other._pool._member == member  # the child kept nobody's place
    other.close()


# Pools that were left


def test_list_and_clear(pool: str, capsys: pytest.CaptureFixture[str]) -> None:
    used, left = opener(pool, MIB)(), opener(f"{pool}.left", MIB)()
    put(used, 1)
    left.close()
    assert main(["list"]) == 0
    lines = dict(line.split("\t", 1) for line in capsys.readouterr().out.splitlines())
    assert lines[pool] == "8192 of 1048576 bytes\t1 in use"
    assert lines[f"{pool}.left"] == "0 of 1048576 bytes\t0 in use"
    assert main(["clear", f"{pool}.left"]) == 0
    assert capsys.readouterr().out == f"{pool}.left\tremoved\n"
    assert RawPool(pool).path.exists()
    assert main(["clear", pool]) == 0
    assert main(["clear", pool]) == 1
    assert f"no such pool: {pool}" in capsys.readouterr().err
    assert not RawPool(pool).path.exists()
    used.close()
    assert main(["what"]) == 2
    assert "clear [POOL...]" in capsys.readouterr().err


def test_what_is_no_pool_of_this_user_is_passed_over(
    pool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    link = RawPool(pool).path
    link.symlink_to(tmp_path / "file")
    for arguments, status in ((["list"], 0), (["clear", pool], 1)):
        assert main(arguments) == status
        said = capsys.readouterr()
        assert f"passed over, for it is no file of this user: {link}" in said.err
        assert pool not in said.out
    assert (tmp_path / "file").read_text() == "precious"
    assert link.is_symlink()


def test_pools_may_go_while_others_are_listed_and_cleared(
    pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = threading.Event()

    def come_and_go() -> None:
        paths = [RawPool(f"{pool}.{n}").path for n in range(20)]
        while not stop.is_set():
            for path in paths:
                path.touch()
            for path in paths:
                path.unlink(missing_ok=True)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for n in range(300):
            assert main(["list"]) == 0
            main(["clear", f"{pool}.{n % 20}"])
    finally:
        stop.set()
        thread.join()


def test_a_user_that_exits_does_not_take_the_pool_along(backend: ShmBackend, pool: str) -> None:
    put(backend, 1)
    program = (
        "import sys; from lmcache_backends.shm import *\n"
        "from lmcache_core.backend import Transfer\n"
        "b = ShmBackend(ShmOptions(capacity=256 << 20, pool=sys.argv[1]))\n"
        "held = [parts for _, parts in b.get(list(s.key for s in b.scan(Transfer(1.0))), Transfer(1.0))]\n"
        "assert len(held) == 1"
    )
    subprocess.run([sys.executable, "-c", program, pool], check=True)
    assert get(backend, 1) == value(1, 5000)


# Death


def run_forked(work: Callable[[], None]) -> int:
    """The wait status of a child that does `work`, which has to open what it uses."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


STRIDE = 1 if SECONDS >= 60 else 7


def first_line() -> int:
    """Before the first at which to kill: of chance, so that a few runs have been at every line."""
    return random.randrange(STRIDE) + 1 - STRIDE


def kill_at(line: int) -> None:
    """From now on, kill this process at the `line`th line of the backend's code."""
    left = line

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal left
        if "lmcache_backends" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def dying(pool: str, act: str, line: int) -> None:
    """One round of a backend's work in a pool of 1 MiB that is full of chunks 0 to 3."""
    if act == "put":  # then also while it opens
        kill_at(line)
    backend = opener(pool, MIB)()
    if act != "put":
        kill_at(line)
    match act:
        case "put":
            put(backend, 50, MIB // 3)
        case "room":
            room = backend.reserve(MIB // 3, [key(50)], Transfer(1.0))
            room[:] = value(50, MIB // 3)
            backend.put([(key(50), [memoryview(b"head"), room])], [key(50)], Transfer(1.0))
        case "get":
            held = [get(backend, number) for number in range(4)]
            held.pop()
        case "delete":
            backend.delete([key(1), key(2)], Transfer(1.0))
    backend.close()
    sys.settrace(None)


def die_holding(pool: str) -> None:
    """Die as two members, amid a change, with a chunk and a room in the hands of each."""
    members = [opener(pool, MIB)() for _ in range(2)]
    held = [get(member, 0) for member in members]
    held += [member.reserve(MIB // 8, [key(50)], Transfer(1.0)) for member in members]
    die = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
    members[0]._pool._hold(Transfer(1.0), die, changing=True)


def test_whatever_line_a_creator_is_killed_at_the_next_makes_the_pool(pool: str) -> None:
    def create() -> None:
        kill_at(line)
        opener(pool, MIB)()
        sys.settrace(None)

    line, status = first_line(), signal.SIGKILL
    while status == signal.SIGKILL:
        line += STRIDE
        print("line", line)  # for whoever sees this fail
        status = run_forked(create)
        backend = opener(pool, MIB)()
        assert put(backend, 1) == 1
        backend.close()
        RawPool(pool).path.unlink()
    assert status == 0
    assert line > 30


@pytest.mark.parametrize("act", ["put", "room", "get", "delete"])
def test_whatever_line_a_process_is_killed_at_the_others_go_on(pool: str, act: str) -> None:
    survivor = opener(pool, MIB)()
    head = b"head" if act == "room" else b""
    expected = {n: value(n, MIB // 4) for n in range(4)} | {50: head + value(50, MIB // 3)}
    line = first_line()
    while True:
        line += STRIDE
        print("line", line)  # for whoever sees this fail
        for number in range(4):
            put(survivor, number, MIB // 4)
        if act == "put":  # one has died before: then also while it mends that
            assert run_forked(lambda: die_holding(pool)) == signal.SIGKILL
        status = run_forked(lambda: dying(pool, act, line))  # noqa: B023
        assert status in (0, signal.SIGKILL)
        began = time.monotonic()
        for number, right in expected.items():
            view = get(survivor, number)
            assert view is None or view == right
            del view
        assert put(survivor, 60, MIB) == 1  # all that the dead held can be had
        assert time.monotonic() - began < 1.0
        check(survivor)
        survivor.delete([key(60)], Transfer(1.0))
        if status == 0:
            break
    assert line > 30
    survivor.close()


def test_what_the_living_hold_outlives_the_dead(pool: str) -> None:
    backend = opener(pool, MIB)()
    put(backend, 0, MIB // 4)
    view = get(backend, 0)
    room = backend.reserve(MIB // 4, [key(1)], Transfer(1.0))
    room[:] = value(1, MIB // 4)
    assert run_forked(lambda: die_holding(pool)) == signal.SIGKILL
    other = opener(pool, MIB)()
    assert put(other, 2, MIB // 2 - 8 * PAGE) == 1  # with all that the dead held
    assert view == value(0, MIB // 4)
    where = np.frombuffer(room, np.uint8).ctypes.data
    assert backend.put([(key(1), [memoryview(b"head"), room])], [key(1)], Transfer(1.0)) == 1
    stored = get(backend, 1)
    assert stored == b"head" + value(1, MIB // 4)
    assert np.frombuffer(stored, np.uint8).ctypes.data == where - 4  # and was not copied
    check(other)
    del view, room, stored
    backend.close()
    other.close()


KEYS = 200


def sized(number: int) -> bytes:
    """Chunk `number`'s frame: from 2 to 120 KiB."""
    return value(number, 2048 + number * 7919 % 120_000)


def endure(pool: str, seed: int, progress: np.ndarray) -> None:
    """Work until killed: every byte that is read must be right."""
    chance = random.Random(seed)
    frames = [sized(number) for number in range(KEYS)]
    keys = [key(number) for number in range(KEYS)]
    backend = opener(pool, 4 * MIB)()
    held: list[tuple[int, memoryview]] = []
    while True:
        batch = chance.sample(range(KEYS), 6)
        wanted = [keys[n] for n in batch]
        match chance.randrange(8):
            case 0:
                backend.put(
                    [(keys[n], [memoryview(frames[n])[:99], memoryview(frames[n])[99:]]) for n in batch[:2]],
                    wanted, Transfer(5.0),
                )  # fmt: skip
            case 1:
                number = batch[0]
                room = backend.reserve(len(frames[number]) - 64, wanted[:1], Transfer(5.0))
                if room is not None:
                    room[:] = frames[number][64:]
                    parts = [memoryview(frames[number])[:64], room]
                    backend.put([(keys[number], parts)], wanted[:1], Transfer(5.0))
                    del parts
                del room
            case 2 if chance.random() < 0.2:
                backend.delete(wanted[:1], Transfer(5.0))
            case 2:
                backend.touch(wanted, Transfer(5.0))
            case 3 | 4:
                backend.contains(wanted, Transfer(5.0))
            case _:
                for i, (view,) in backend.get(wanted, Transfer(5.0)):
                    held.append((batch[i], view))
                    del view
        progress[0] += len(wanted)
        chance.shuffle(held)
        while len(held) > chance.randrange(8):  # some are looked at only much later
            number, view = held.pop()
            assert view == frames[number], f"chunk {number} is wrong"
            progress[1] += 1
            del view


@pytest.mark.timeout(SECONDS + 200)
def test_processes_killed_at_random_harm_nobody(pool: str) -> None:
    context = multiprocessing.get_context("fork")
    counts: list[np.ndarray] = []
    survivor = opener(pool, 4 * MIB)()
    chance = random.Random(7)

    def started() -> multiprocessing.Process:
        counts.append(np.frombuffer(mmap.mmap(-1, 16), np.int64))
        worker = context.Process(target=endure, args=(pool, len(counts), counts[-1]))
        worker.start()
        return worker

    workers = [started() for _ in range(6)]
    kills = 0
    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.0, 0.1))
            for worker in workers:
                assert worker.is_alive(), f"exit code {worker.exitcode}: see its traceback"
            victim = workers.pop(chance.randrange(len(workers)))
            victim.kill()
            victim.join()
            assert victim.exitcode == -signal.SIGKILL
            victim.close()
            kills += 1
            began = time.monotonic()
            while get(survivor, 10_000 + kills) is None:  # held up, or evicted at once
                put(survivor, 10_000 + kills, 1000)
                assert time.monotonic() - began < 1.0
            workers.append(started())
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
            worker.close()
    for number in range(KEYS):
        view = get(survivor, number)
        assert view is None or view == sized(number)
        del view
    assert put(survivor, 20_000, 4 * MIB) == 1  # no page is lost, and no lease of the dead holds
    check(survivor)
    survivor.close()
    operations, checked = (int(sum(count[n] for count in counts)) for n in (0, 1))
    print(f"\n{kills} kills, {operations:,} operations, {checked:,} chunks read and right")
    assert kills > SECONDS
    assert checked > 100 * SECONDS
