"""BackendConformance: everything that a StorageBackend promises."""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import SimpleQueue
from typing import ClassVar, Protocol, TypeVar

import pytest

from lmcache_core.backend import StorageBackend, Stored, SupportsScan, Transfer
from lmcache_core.io.buffers import Buffers
from lmcache_core.kv.keys import ChunkKey
from lmcache_core.testing.leaks import no_leaks
from lmcache_core.testing.processes import forked_early

SMALL = 64 * 1024
"""Capacity, in bytes, of what the `open_small` fixture opens."""
TIMEOUT = 20.0

Open = Callable[[], StorageBackend]
T = TypeVar("T")


class RawAccess(Protocol):
    """The store without the backend: a dict, a directory, a bare client.

    What the backend writes is read through this, and what it reads was written through this, so
    that two mistakes that cancel each other are seen.
    """

    def read(self, key: ChunkKey) -> bytes | None:
        """The value as it lies in the store, or None."""

    def write(self, key: ChunkKey, value: bytes) -> None:
        """Put a value there, however damaged."""

    def keys(self) -> set[ChunkKey]:
        """Every key that is there."""


def _needs(ability: str) -> Callable[[T], T]:
    """Mark a test that only a store with this ability has to pass."""

    def mark(test: T) -> T:
        test._needs = ability  # type: ignore[attr-defined]
        return test

    return mark


class BackendConformance:
    """Subclass it, name it Test..., and define the fixtures below.

    open_backend: a callable that opens the store and can be called again, for the same store.
        Where `shared`, it must be picklable (functools.partial of your class and its options).
    raw: a RawAccess to the same store, valid while a backend is open.
    open_small: the same as open_backend for a store of SMALL bytes; only where `bounded`.
    """

    persistent: ClassVar[bool] = False
    """Values survive close()."""
    shared: ClassVar[bool] = False
    """Several backends, also in other processes, see one store."""
    bounded: ClassVar[bool] = False
    """The store keeps to a capacity by evicting."""

    def __init_subclass__(cls) -> None:
        """Take out the tests of abilities that the store does not claim."""
        super().__init_subclass__()
        for name, test in vars(BackendConformance).items():
            ability = getattr(test, "_needs", None)
            if ability and not getattr(cls, ability):
                setattr(cls, name, None)

    @pytest.fixture
    def open_backend(self) -> Open:
        raise NotImplementedError("define the fixture open_backend")

    @pytest.fixture
    def raw(self) -> RawAccess:
        raise NotImplementedError("define the fixture raw")

    @pytest.fixture
    def open_small(self) -> Open:
        raise NotImplementedError("define the fixture open_small, or set bounded = False")

    @pytest.fixture
    def backend(self, open_backend: Open) -> Iterator[StorageBackend]:
        with no_leaks():
            backend = open_backend()
            yield backend
            backend.close()

    # One value

    @pytest.mark.parametrize("nbytes", [0, 1, 79, 4096, 65537, 3 << 20])
    def test_a_value_comes_back_whole(
        self, backend: StorageBackend, raw: RawAccess, nbytes: int
    ) -> None:
        key, value = _key(1), _value(1, nbytes)
        assert _put(backend, {key: value}) == 1
        assert raw.read(key) == value
        assert _get(backend, [key]) == {0: value}
        assert backend.contains([key], clock()) == [True]

    def test_a_large_value(self, backend: StorageBackend, raw: RawAccess) -> None:
        key, value = _key(1), _value(1, 48 << 20)
        assert _put(backend, {key: value}) == 1
        assert raw.read(key) == value
        assert _get(backend, [key]) == {0: value}

    def test_parts_are_joined_in_order_and_empty_ones_are_fine(
        self, backend: StorageBackend, raw: RawAccess
    ) -> None:
        key, value = _key(1), _value(1, 5000)
        parts = [memoryview(value[i : i + 2]) for i in range(0, 5000, 2)]  # more than IOV_MAX
        parts = [memoryview(b""), *parts[:9], memoryview(b""), *parts[9:], memoryview(b"")]
        assert backend.put([(key, parts)], [key], clock()) == 1
        assert raw.read(key) == value
        assert _get(backend, [key]) == {0: value}

    def test_what_is_in_the_store_already_is_found(
        self, backend: StorageBackend, raw: RawAccess
    ) -> None:
        key, value = _key(1), _value(1, 5000)
        raw.write(key, value)
        assert backend.contains([key], clock()) == [True]
        assert _get(backend, [key]) == {0: value}

    def test_a_value_that_is_there_is_not_written_again(
        self, backend: StorageBackend, raw: RawAccess
    ) -> None:
        key = _key(1)
        raw.write(key, b"first")
        assert _put(backend, {key: b"second"}) == 1
        assert raw.read(key) == b"first"

    def test_reading_lands_in_the_callers_buffer_or_in_memory_that_stays(
        self, backend: StorageBackend
    ) -> None:
        keys = [_key(n) for n in range(8)]
        _put(backend, {key: _value(n, 5000) for n, key in enumerate(keys)})
        held = dict(backend.get(keys, clock()))
        backend.delete(keys, clock())
        _put(backend, {_key(n): _value(n, 5000) for n in range(8, 16)})
        for n in range(8):
            assert b"".join(held[n]) == _value(n, 5000)

    # Batches

    def test_absent_keys_are_left_out(self, backend: StorageBackend) -> None:
        here, gone = _key(1), _key(2)
        _put(backend, {here: b"x"})
        assert backend.contains([gone, here, gone], clock()) == [False, True, False]
        assert _get(backend, [gone, here, gone]) == {1: b"x"}

    def test_a_batch_may_be_empty(self, backend: StorageBackend) -> None:
        assert backend.contains([], clock()) == []
        assert _get(backend, []) == {}
        assert backend.put([], [], clock()) == 0
        backend.delete([], clock())
        backend.touch([], clock())

    def test_a_batch_may_name_a_key_twice(self, backend: StorageBackend) -> None:
        key = _key(1)
        assert _put(backend, {key: b"x"}) == 1
        assert backend.contains([key, key], clock()) == [True, True]
        assert _get(backend, [key, key]) == {0: b"x", 1: b"x"}

    def test_many_at_once(self, backend: StorageBackend, raw: RawAccess) -> None:
        values = {_key(n): _value(n, 300 + n) for n in range(300)}
        assert _put(backend, values) == 300
        assert raw.keys() == set(values)
        keys = list(values)
        assert all(backend.contains(keys, clock()))
        assert _get(backend, keys) == {n: values[key] for n, key in enumerate(keys)}

    def test_delete_removes_what_it_names_and_nothing_else(
        self, backend: StorageBackend, raw: RawAccess
    ) -> None:
        keys = [_key(n) for n in range(4)]
        _put(backend, dict.fromkeys(keys, b"x"))
        backend.delete([keys[1], keys[3], _key(9)], clock())
        assert raw.keys() == {keys[0], keys[2]}
        assert backend.contains(keys, clock()) == [True, False, True, False]

    def test_scan_tells_every_key_and_its_size(self, backend: StorageBackend) -> None:
        values = {_key(n): _value(n, 100 * n) for n in range(1, 20)}
        assert list(scan(backend)) == []
        _put(backend, values)
        found = {stored.key: stored.nbytes for stored in scan(backend)}
        assert found == {key: len(value) for key, value in values.items()}

    def test_touch_and_ping_are_harmless(self, backend: StorageBackend) -> None:
        keys = [_key(n) for n in range(3)]
        _put(backend, dict.fromkeys(keys, b"x"))
        backend.touch([*keys, _key(9)], clock())
        backend.ping(clock())
        assert all(backend.contains(keys, clock()))

    # What may go wrong

    def test_a_put_that_fails_leaves_nothing_or_the_old_value(
        self, backend: StorageBackend, raw: RawAccess
    ) -> None:
        """Here the buffer that is to be written turns out to be gone."""
        fresh, old = _key(1), _key(2)
        raw.write(old, b"old")
        broken = memoryview(bytearray(b"x" * 100))
        broken.release()
        for key in (fresh, old):
            try:
                stored = backend.put([(key, [memoryview(b"start"), broken])], [key], clock())
            except Exception:
                stored = 0
            assert stored == 0 or key == old
        assert raw.read(old) == b"old"
        assert raw.read(fresh) is None
        assert backend.contains([fresh, old], clock()) == [False, True]
        assert _put(backend, {fresh: b"new"}) == 1
        assert raw.read(fresh) == b"new"

    @pytest.mark.parametrize("damage", [b"", b"x", b"y" * 5000])
    def test_a_damaged_value_is_handed_on_or_left_out_and_stays_alone(
        self, backend: StorageBackend, raw: RawAccess, damage: bytes
    ) -> None:
        """Checking a frame is the tier's affair. Mixing it up with a neighbour's is a fault."""
        keys = [_key(n) for n in range(5)]
        values = [_value(n, 3000) for n in range(5)]
        _put(backend, dict(zip(keys, values, strict=True)))
        backend.delete([keys[2]], clock())
        raw.write(keys[2], damage)
        got = _get(backend, keys)
        assert got.pop(2, b"") in (damage, b"")
        assert got == {n: value for n, value in enumerate(values) if n != 2}

    def test_what_is_larger_than_any_frame_is_handed_on_empty_or_left_out_and_stays_alone(
        self, backend: StorageBackend, raw: RawAccess
    ) -> None:
        """Whoever can write to a store can make it claim any size. Memory of the store's own may
        be handed on as it is: nothing is allocated for it."""
        keys = [_key(n) for n in range(5)]
        values = [_value(n, 3000) for n in range(5)]
        values[2] = _value(2, 9000)
        _put(backend, dict(zip(keys, values, strict=True)))
        limited = Transfer(TIMEOUT, limit=5000)
        got = {i: b"".join(parts) for i, parts in backend.get(keys, limited)}
        assert got.pop(2, b"") in (b"", values[2])
        assert got == {n: value for n, value in enumerate(values) if n != 2}

    def test_a_load_that_is_given_up_leaves_nothing_behind(self, backend: StorageBackend) -> None:
        keys = [_key(n) for n in range(50)]
        _put(backend, {key: _value(n, 3000) for n, key in enumerate(keys)})
        for _ in range(20):
            next(iter(backend.get(keys, clock())))
        assert _get(backend, keys[:1]) == {0: _value(0, 3000)}

    def test_a_deadline_that_cannot_be_kept_is_an_error_and_not_a_wait(
        self, backend: StorageBackend
    ) -> None:
        """A call may still succeed: it only must not go on without progress."""
        keys = [_key(n) for n in range(20)]
        values = {key: _value(n, 5000) for n, key in enumerate(keys)}
        _put(backend, values)
        began = time.monotonic()
        for call in (
            lambda: backend.contains(keys, clock(1e-6)),
            lambda: list(backend.get(keys, clock(1e-6))),
            lambda: backend.touch(keys, clock(1e-6)),
            lambda: backend.ping(clock(1e-6)),
        ):
            with contextlib.suppress(Exception):
                call()
        assert time.monotonic() - began < TIMEOUT
        assert _get(backend, keys) == dict(enumerate(values.values()))

    def test_threads_may_do_everything_at_once(self, backend: StorageBackend) -> None:
        """Every value that is read is whole and belongs to its key."""
        keys = [_key(n) for n in range(24)]
        values = [_value(n, 500 + 37 * n) for n in range(24)]
        wrong: list[int] = []

        def work(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(60):
                picked = chance.sample(range(24), 6)
                batch = [keys[n] for n in picked]
                match chance.randrange(4):
                    case 0:
                        _put(backend, {keys[n]: values[n] for n in picked})
                    case 1:
                        backend.delete(batch[:2], clock())
                    case _:
                        got = _get(backend, batch)
                        wrong.extend(n for n, v in got.items() if v != values[picked[n]])
                        backend.contains(batch, clock())

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert wrong == []
        assert _put(backend, dict(zip(keys, values, strict=True))) == 24
        assert len(_get(backend, keys)) == 24

    # Closing and sharing

    @pytest.fixture(scope="class")
    @classmethod
    def processes(cls) -> ForkServerContext:
        """Of a wider scope than a test, so that it comes before what counts open files."""
        return forked_early()

    def test_opening_and_closing_leaves_nothing_behind(self, open_backend: Open) -> None:
        with no_leaks():
            for _ in range(5):
                open_backend().close()

    @_needs("persistent")
    def test_values_survive_a_reopening(self, open_backend: Open) -> None:
        values = {_key(n): _value(n, 3000) for n in range(9)}
        first = open_backend()
        _put(first, values)
        first.close()
        again = open_backend()
        assert _get(again, list(values)) == dict(enumerate(values.values()))
        again.close()

    @_needs("shared")
    def test_two_backends_see_each_others_values_at_once(self, open_backend: Open) -> None:
        one, two = open_backend(), open_backend()
        for n in range(10):
            _put(one, {_key(n): _value(n, 3000)})
            assert _get(two, [_key(n)]) == {0: _value(n, 3000)}
        two.delete([_key(3)], clock())
        assert one.contains([_key(3), _key(4)], clock()) == [False, True]
        one.close()
        two.close()

    @_needs("shared")
    def test_processes_may_do_everything_at_once(
        self, open_backend: Open, processes: ForkServerContext
    ) -> None:
        outcomes = processes.SimpleQueue()
        workers = [
            processes.Process(target=_hammer, args=(open_backend, seed, outcomes))
            for seed in range(3)
        ]
        for worker in workers:
            worker.start()
        results = [outcomes.get() for _ in workers]
        for worker in workers:
            worker.join(60)
        assert results == ["fine"] * 3

    # Capacity

    @_needs("bounded")
    def test_a_full_store_keeps_to_its_capacity(self, open_small: Open, raw: RawAccess) -> None:
        backend = open_small()
        keys = [_key(n) for n in range(100)]
        transfer = clock()
        for n, key in enumerate(keys):
            assert _put(backend, {key: _value(n, SMALL // 10)}, transfer) == 1
            assert sum(stored.nbytes for stored in scan(backend)) <= SMALL
        left = {stored.key for stored in scan(backend)}
        assert len(left) >= 5
        assert set(transfer.evicted) == set(keys) - left
        assert len(transfer.evicted) == len(set(transfer.evicted))
        backend.close()

    @_needs("bounded")
    def test_a_value_larger_than_the_store_is_refused_and_evicts_nothing(
        self, open_small: Open
    ) -> None:
        backend = open_small()
        _put(backend, {_key(1): b"x"})
        assert _put(backend, {_key(2): bytes(SMALL + 1)}) == 0
        assert backend.contains([_key(1), _key(2)], clock()) == [True, False]
        backend.close()

    @_needs("bounded")
    def test_what_is_kept_of_a_sequence_that_does_not_fit_is_its_beginning(
        self, open_small: Open
    ) -> None:
        backend = open_small()
        values = {_key(n): _value(n, SMALL // 10) for n in range(20)}
        stored = _put(backend, values)
        assert 0 < stored < 20
        present = backend.contains(list(values), clock())
        assert present == [n < stored for n in range(20)]
        backend.close()

    @_needs("bounded")
    def test_a_sequence_larger_than_the_store_gets_what_is_free_and_displaces_nothing(
        self, open_small: Open
    ) -> None:
        backend = open_small()
        old = {_key(n): _value(n, SMALL // 10) for n in range(100, 105)}
        _put(backend, old)
        keys, transfer = [_key(n) for n in range(20)], clock()
        for n in range(0, 20, 4):  # a few at a time, of a sequence that is known as a whole
            frames: list[tuple[ChunkKey, Buffers]] = [
                (key, [memoryview(_value(1, SMALL // 10))]) for key in keys[n : n + 4]
            ]
            if backend.put(frames, keys, transfer) < 4:
                break
        assert transfer.evicted == []
        assert all(backend.contains(list(old), clock()))
        assert backend.contains(keys[:2], clock()) == [True, True]
        backend.close()

    @_needs("bounded")
    def test_the_least_recently_used_sequence_leaves_first_and_leaves_before_roots(
        self, open_small: Open
    ) -> None:
        backend = open_small()
        old, young = [_key(n) for n in range(4)], [_key(n) for n in range(10, 14)]
        for chain in (old, young):
            _put(backend, {key: _value(1, SMALL // 10) for key in chain})
            time.sleep(0.01)
        backend.touch(old, clock())  # now `young` is the older one
        time.sleep(0.01)
        for n in range(20, 24):
            _put(backend, {_key(n): _value(n, SMALL // 10)})
        assert all(backend.contains(old, clock()))
        there = backend.contains(young, clock())
        assert not all(there)
        assert there == sorted(there, reverse=True)  # what is left is its beginning
        backend.close()


def _hammer(open_backend: Open, seed: int, outcomes: SimpleQueue[str]) -> None:
    """Put, get and delete shared keys; every value that is read must be its key's."""
    chance = random.Random(seed)
    try:
        backend = open_backend()
        for _ in range(80):
            numbers = chance.sample(range(30), 5)
            values = {_key(n): _value(n, 2000 + n) for n in numbers}
            if chance.random() < 0.5:
                _put(backend, values)
            got = _get(backend, list(values))
            if any(got[i] != value for i, value in enumerate(values.values()) if i in got):
                raise AssertionError("another key's value, or half a one")
            if chance.random() < 0.3:
                backend.delete(list(values)[:2], clock())
        backend.close()
    except BaseException as error:
        outcomes.put(repr(error))
    else:
        outcomes.put("fine")


def _key(number: int) -> ChunkKey:
    return ChunkKey(hashlib.sha256(b"key %d" % number).digest())


def _value(number: int, nbytes: int) -> bytes:
    return random.Random(number).randbytes(nbytes)


def clock(timeout: float = TIMEOUT) -> Transfer:
    """What a tier would hand to a call."""
    return Transfer(timeout)


def scan(backend: StorageBackend) -> Iterator[Stored]:
    """Every frame that is there, of a backend that can tell."""
    if not isinstance(backend, SupportsScan):
        pytest.skip("the backend has no scan")
    return backend.scan(clock())


def _put(
    backend: StorageBackend, values: dict[ChunkKey, bytes], transfer: Transfer | None = None
) -> int:
    """Put values as one sequence, each in a few parts, and touch it."""
    frames: list[tuple[ChunkKey, Buffers]] = [
        (key, [memoryview(value)[: len(value) // 3], memoryview(value)[len(value) // 3 :]])
        for key, value in values.items()
    ]
    stored = backend.put(frames, list(values), transfer or clock())
    backend.touch(list(values), clock())
    return stored


def _get(backend: StorageBackend, keys: Sequence[ChunkKey]) -> dict[int, bytes]:
    return {i: b"".join(parts) for i, parts in backend.get(keys, clock())}
