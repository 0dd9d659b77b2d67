"""Contract: what a backend returned, looked at before anybody relies on it.

What breaks the contract is a failure of the store like others: counted, and told with the method.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NoReturn, TypeVar

import numpy as np

from lmcache_core.backend import StorageBackend, Stored
from lmcache_core.errors import ConfigError, StorageError
from lmcache_core.io.buffers import Buffers
from lmcache_core.io.daemon_pool import as_exception
from lmcache_core.kv.keys import ChunkKey
from lmcache_core.plugins.blame import is_the_process_own

T = TypeVar("T")


class BrokenContractError(StorageError):
    """A backend's method returned what it must not."""

    def __init__(self, method: str, text: str) -> None:
        super().__init__(f"{method} {text}")
        self.method = method


def _broken(method: str, expected: str, got: object) -> NoReturn:
    raise BrokenContractError(method, f"gives {_named(got)}, not {expected}")


def _named(got: object) -> str:
    """A value, as far as it can be shown without calling what is its author's."""
    plain = type(got) in (bool, int, float, str, bytes, type(None))
    return repr(got)[:60] if plain else f"a {type(got).__qualname__}"


def backend_made(made: object) -> StorageBackend:
    """What a backend's class gave."""
    if isinstance(made, StorageBackend):
        return made
    raise ConfigError(f"its class gives {_named(made)}, not a StorageBackend")


def streams(number: object) -> int:
    """The attribute of that name."""
    if isinstance(number, int | np.integer) and number >= 1:
        return int(number)
    _broken("streams", "a number of at least 1", number)


def found(answers: Any, count: int) -> list[bool]:
    """What `contains` gave for so many keys."""
    if isinstance(answers, str | bytes | dict | set):
        _broken("contains", "a list of bools", answers)
    try:
        there = list(answers)
    except TypeError:
        _broken("contains", "a list of bools", answers)
    if len(there) != count:
        raise BrokenContractError("contains", f"gives {len(there)} answers to {count} keys")
    for each in there:
        if not isinstance(each, bool | np.bool_ | int):
            _broken("contains", "bools", each)
    return list(map(bool, there))


def read(item: Any, count: int) -> tuple[int, Buffers]:
    """What `get` yielded of so many keys: an index, and the parts of a frame."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        _broken("get", "(index, frame)", item)
    index, parts = item
    if not isinstance(index, int | np.integer) or not 0 <= index < count:
        _broken("get", f"an index below {count}", index)
    if not isinstance(parts, list | tuple):
        _broken("get", "a list of memoryviews", parts)
    for part in parts:
        if not _is_bytes(part):
            _broken("get", "memoryviews of bytes", part)
    return int(index), parts


def stored(number: object, count: int) -> int:
    """What `put` gave for so many frames."""
    if isinstance(number, int | np.integer) and 0 <= number <= count:
        return int(number)
    _broken("put", f"how many of {count} frames are there", number)


def room(memory: object, nbytes: int) -> memoryview | None:
    """What `reserve` gave for so many bytes."""
    if memory is None:
        return None
    if isinstance(memory, memoryview) and _is_bytes(memory) and memory.nbytes == nbytes:
        if not memory.readonly:
            return memory
        raise BrokenContractError("reserve", "gives memory that cannot be written")
    _broken("reserve", f"{nbytes} writable bytes", memory)


def scanned(item: Any) -> Stored:
    """What `scan` yielded."""
    if isinstance(item, Stored) and isinstance(item.key, ChunkKey) and type(item.nbytes) is int:
        return item
    _broken("scan", "Stored", item)


def _is_bytes(part: object) -> bool:
    return isinstance(part, memoryview) and part.itemsize == 1 and part.c_contiguous


def failure(error: BaseException) -> BaseException:
    """What came out of a backend or serde on a thread of an engine's, as what the engine catches;
    unless it is the process's own, such as Ctrl-C."""
    return error if is_the_process_own(error) else as_exception(error)


def failing(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items; what is raised meanwhile is a `failure`."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except BaseException as error:
            raise failure(error) from None
        yield item
        del item
