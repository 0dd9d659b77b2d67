"""Values that forward reads, kept in every kind of thing that can hold one."""

from __future__ import annotations

import array
import collections
import contextlib
import contextvars
import ctypes
import dataclasses
import decimal
import enum
import fractions
import functools
import mmap
import multiprocessing
import operator
import os
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from tests.connectors.transformers.mutations import TABLE, add, first, mutation, output

FACTOR = 1.0
FACTORS = [1.0]
SETTINGS = {"scale": {"factor": 1.0}}
VECTOR = torch.ones(1)
CONTEXT: contextvars.ContextVar[float] = contextvars.ContextVar("factor", default=1.0)
REFUSED = {
    "state_of_a_generator",
    "memory_of_c",
    "memory_shared_by_processes",
    "memory_that_is_mapped",
    "structure_of_c",
}
"""A model whose forward reads these may be refused at once."""
LOCAL = threading.local()
MODULE = types.ModuleType("lmcache_test_settings")


class Read(torch.nn.Module):
    """A block times what it reads."""

    def __init__(self, inner: torch.nn.Module, read: Callable[[], Any]) -> None:
        super().__init__()
        self.inner = inner
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.read()


def reads(model: Any, read: Callable[[], Any]) -> Any:
    """Let the first projection be multiplied with what `read` gives."""
    first(model).self_attn.o_proj = block = Read(output(model), read).eval()
    return block


def _row(name: str, start: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]) -> None:
    """A row from a function that gives what reads and what changes, and then changes back."""

    def change(model: Any) -> Iterator[Any]:
        read, alter = start()
        reads(model, read)
        yield
        back = alter()
        yield
        if callable(back):
            back()

    add(f"state_{name}", change, refused=name in REFUSED, soak=len(TABLE) % 2 == 1)


def _state(function: Callable[[], Any]) -> Callable[[], Any]:
    _row(function.__name__, function)
    return function


@_state
def list_element() -> Any:
    state = [1.0]
    return lambda: state[0], lambda: state.__setitem__(0, 2.0)


@_state
def list_order() -> Any:
    state = [1.0, 2.0]
    return lambda: state[0], state.reverse


@_state
def list_length() -> Any:
    state = [0]
    return lambda: float(len(state)), lambda: state.append(0)


@_state
def dict_value() -> Any:
    state = {"a": 1.0}
    return lambda: state["a"], lambda: state.update(a=2.0)


@_state
def dict_key() -> Any:
    state = {1.0: "a"}

    def alter() -> None:
        state.clear()
        state[2.0] = "a"

    return lambda: next(iter(state)), alter


@_state
def dict_order() -> Any:
    state = {"a": 1.0, "b": 2.0}
    return lambda: next(iter(state.values())), lambda: state.update(a=state.pop("a"))


@_state
def nested_deeply() -> Any:
    state: Any = {"a": [({"b": [1.0]},)]}
    return lambda: state["a"][0][0]["b"][0], lambda: state["a"][0][0]["b"].__setitem__(0, 2.0)


@_state
def member_of_a_set() -> Any:
    state = {1.0}
    return lambda: max(state), lambda: state.add(2.0)


@_state
def key_of_a_set_by_object() -> Any:
    class Key:
        factor = 1.0

    key = Key()
    state = {key}
    return lambda: next(iter(state)).factor, lambda: setattr(key, "factor", 2.0)


@_state
def deque() -> Any:
    state = collections.deque([1.0, 2.0])
    return lambda: state[0], lambda: state.rotate(1)


@_state
def counter() -> Any:
    state = collections.Counter({"a": 1})
    return lambda: state["a"], lambda: state.update("a")


@_state
def chain_of_dicts() -> Any:
    state = collections.ChainMap({}, {"a": 1.0})
    return lambda: state["a"], lambda: state.maps[0].update(a=2.0)


@_state
def default_dict() -> Any:
    state: Any = collections.defaultdict(lambda: 1.0)
    return lambda: state.get("a", 1.0), lambda: state.update(a=2.0)


@_state
def user_dict() -> Any:
    state = collections.UserDict({"a": 1.0})
    return lambda: state["a"], lambda: state.data.update(a=2.0)


@_state
def ordered_dict() -> Any:
    state = collections.OrderedDict(a=1.0, b=2.0)
    return lambda: next(iter(state.values())), lambda: state.move_to_end("a")


@_state
def mapping_proxy() -> Any:
    inner = {"a": 1.0}
    state = types.MappingProxyType(inner)
    return lambda: state["a"], lambda: inner.update(a=2.0)


@_state
def attribute_of_a_dicts_subclass() -> Any:
    class Settings(dict[str, float]):
        factor = 1.0

    state = Settings()
    return lambda: state.factor, lambda: setattr(state, "factor", 2.0)


@_state
def attribute_of_a_strings_subclass() -> Any:
    class Name(str):
        factor = 1.0

    state = Name("a")
    return lambda: state.factor, lambda: setattr(state, "factor", 2.0)


@_state
def attribute_of_an_ints_subclass() -> Any:
    class Number(int):
        factor = 1.0

    state = Number(3)
    return lambda: state.factor, lambda: setattr(state, "factor", 2.0)


@_state
def item_of_a_lists_subclass_that_lies() -> Any:
    """What iterates over it does not see what forward gets."""

    class Odd(list[float]):
        factor = 1.0

        def __getitem__(self, index: Any) -> Any:
            return self.factor

    state = Odd([0.0])
    return lambda: state[0], lambda: setattr(state, "factor", 2.0)


@_state
def bytearray_element() -> Any:
    state = bytearray([1])
    return lambda: state[0], lambda: state.__setitem__(0, 2)


@_state
def memory_behind_a_view() -> Any:
    memory = bytearray([1, 1])
    state = memoryview(memory)[1:]
    return lambda: state[0], lambda: memory.__setitem__(1, 2)


@_state
def array_element() -> Any:
    state = array.array("d", [1.0])
    return lambda: state[0], lambda: state.__setitem__(0, 2.0)


@_state
def numpy_array() -> Any:
    state = numpy.ones(3)
    return lambda: float(state[1]), lambda: state.__setitem__(1, 2.0)


@_state
def large_numpy_array() -> Any:
    state = numpy.ones((300, 300))
    return lambda: float(state[123, 45]), lambda: state.__setitem__((123, 45), 2.0)


@_state
def numpy_array_of_objects() -> Any:
    state = numpy.array([1.0, "a"], dtype=object)
    return lambda: state[0], lambda: state.__setitem__(0, 2.0)


@_state
def numpy_record() -> Any:
    state = numpy.zeros(2, dtype=[("a", "f4"), ("b", "f8")])
    state["b"] = 1.0
    return lambda: float(state["b"][1]), lambda: state["b"].__setitem__(1, 2.0)


@_state
def numpy_strided_view() -> Any:
    memory = numpy.ones(10)
    state = memory[::3]
    return lambda: float(state[2]), lambda: memory.__setitem__(6, 2.0)


@_state
def memory_that_is_mapped() -> Any:
    state = mmap.mmap(-1, 4096)
    state[0] = 1
    return lambda: state[0], lambda: state.__setitem__(0, 2)


@_state
def memory_of_c() -> Any:
    state = ctypes.c_double(1.0)
    return lambda: state.value, lambda: setattr(state, "value", 2.0)


@_state
def structure_of_c() -> Any:
    class Point(ctypes.Structure):
        _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_double)]

    state = Point(0, 1.0)
    return lambda: state.y, lambda: setattr(state, "y", 2.0)


@_state
def memory_shared_by_processes() -> Any:
    state = multiprocessing.get_context("spawn").Value("d", 1.0)
    return lambda: state.value, lambda: setattr(state, "value", 2.0)


@_state
def tensor_in_a_list() -> Any:
    state = [torch.ones(1)]
    return lambda: state[0].item(), lambda: state[0].data.fill_(2) and None


@_state
def large_tensor_in_a_list() -> Any:
    state = [torch.ones(300, 300)]
    return lambda: state[0][123, 45].item(), lambda: state[0].data[123, 45].fill_(2) and None


@_state
def large_tensor_in_a_dict_of_an_object() -> Any:
    state = types.SimpleNamespace(held={"t": torch.ones(300, 300)})
    return lambda: state.held["t"][
        1, 2
    ].item(), lambda: state.held["t"].data[1, 2].fill_(2) and None


@_state
def dataclass() -> Any:
    @dataclasses.dataclass
    class Settings:
        factor: float = 1.0

    state = Settings()
    return lambda: state.factor, lambda: setattr(state, "factor", 2.0)


@_state
def frozen_dataclass() -> Any:
    @dataclasses.dataclass(frozen=True)
    class Settings:
        factor: float = 1.0

    state = Settings()
    return lambda: state.factor, lambda: object.__setattr__(state, "factor", 2.0)


@_state
def dataclass_with_slots() -> Any:
    @dataclasses.dataclass(slots=True)
    class Settings:
        factor: float = 1.0

    state = Settings()
    return lambda: state.factor, lambda: setattr(state, "factor", 2.0)


@_state
def slots() -> Any:
    class Settings:
        __slots__ = ("factor",)

    state = Settings()
    state.factor = 1.0
    return lambda: state.factor, lambda: setattr(state, "factor", 2.0)


@_state
def slots_of_a_base_class() -> Any:
    class Base:
        __slots__ = ("factor",)

    class Settings(Base):
        __slots__ = ("other",)

    state = Settings()
    state.factor = 1.0
    return lambda: state.factor, lambda: setattr(state, "factor", 2.0)


@_state
def slots_with_private_names() -> Any:
    class Settings:
        __slots__ = ("__factor",)

        def __init__(self) -> None:
            self.__factor = 1.0

        def get(self) -> float:
            return self.__factor

        def put(self) -> None:
            self.__factor = 2.0

    state = Settings()
    return state.get, state.put


@_state
def named_tuple_in_a_list() -> Any:
    class Settings(NamedTuple):
        factor: float

    state = [Settings(1.0)]
    return lambda: state[0].factor, lambda: state.__setitem__(0, Settings(2.0))


@_state
def namespace() -> Any:
    state = types.SimpleNamespace(factor=1.0)
    return lambda: state.factor, lambda: setattr(state, "factor", 2.0)


@_state
def value_of_an_enum() -> Any:
    class Factor(enum.Enum):
        ONE = 1.0

    state = Factor.ONE
    return lambda: state.value, lambda: setattr(state, "_value_", 2.0)


@_state
def attribute_of_an_enums_member() -> Any:
    class Factor(enum.Enum):
        ONE = 1.0

    Factor.ONE.factor = 1.0  # type: ignore[attr-defined]
    return lambda: Factor.ONE.factor, lambda: setattr(Factor.ONE, "factor", 2.0)


@_state
def number_of_another_kind() -> Any:
    state: list[Any] = [fractions.Fraction(1), decimal.Decimal(1)]

    def alter() -> None:
        state[:] = [fractions.Fraction(2), decimal.Decimal(2)]

    return lambda: float(state[0]) * float(state[1]), alter


@_state
def class_attribute() -> Any:
    class Settings:
        factor = 1.0

    return lambda: Settings.factor, lambda: setattr(Settings, "factor", 2.0)


@_state
def class_attribute_through_an_instance() -> Any:
    class Settings:
        factor = 1.0

    state = Settings()
    return lambda: state.factor, lambda: setattr(Settings, "factor", 2.0)


@_state
def class_attribute_of_a_base() -> Any:
    class Base:
        factor = 1.0

    class Settings(Base):
        pass

    return lambda: Settings.factor, lambda: setattr(Base, "factor", 2.0)


@_state
def list_on_a_class() -> Any:
    class Settings:
        factors: list[float] = [1.0]  # noqa: RUF012

    state = Settings()
    return lambda: state.factors[0], lambda: Settings.factors.__setitem__(0, 2.0)


@_state
def attribute_of_a_metaclass() -> Any:
    class Meta(type):
        factor = 1.0

    class Settings(metaclass=Meta):
        pass

    return lambda: Settings.factor, lambda: setattr(Meta, "factor", 2.0)


@_state
def property_exchanged() -> Any:
    class Settings:
        @property
        def factor(self) -> float:
            return 1.0

    state = Settings()
    return lambda: state.factor, lambda: setattr(Settings, "factor", property(lambda self: 2.0))


@_state
def value_behind_a_property() -> Any:
    class Settings:
        _kept = {"factor": 1.0}  # noqa: RUF012

        @property
        def factor(self) -> float:
            return self._kept["factor"]

    state = Settings()
    return lambda: state.factor, lambda: state._kept.update(factor=2.0)


@_state
def cached_property() -> Any:
    class Settings:
        @functools.cached_property
        def factor(self) -> float:
            return 1.0

    state = Settings()
    assert state.factor
    return lambda: state.factor, lambda: state.__dict__.update(factor=2.0)


@_state
def descriptor_of_ones_own() -> Any:
    class Kept:
        value = 1.0

        def __get__(self, instance: object, owner: type) -> float:
            return self.value

    class Settings:
        factor = Kept()

    state = Settings()
    return lambda: state.factor, lambda: setattr(vars(Settings)["factor"], "value", 2.0)


@_state
def attribute_made_up_at_access() -> Any:
    kept = {"factor": 1.0}

    class Settings:
        def __getattr__(self, name: str) -> Any:
            return kept[name]

    state = Settings()
    return lambda: state.factor, lambda: kept.update(factor=2.0)


@_state
def attribute_by_a_name_put_together() -> Any:
    class Settings:
        factor = 1.0

    state, one, two = Settings(), "fac", "tor"
    return lambda: getattr(state, one + two), lambda: setattr(Settings, "factor", 2.0)


@_state
def class_attribute_by_a_constant_name() -> Any:
    class Settings:
        name_that_no_code_says = 1.0

    state = Settings()
    return (
        lambda: getattr(state, "name_that_no_code_says"),  # noqa: B009
        lambda: setattr(Settings, "name_that_no_code_says", 2.0),
    )


@_state
def attribute_by_an_operator() -> Any:
    state = types.SimpleNamespace(a=types.SimpleNamespace(factor=1.0))
    get = operator.attrgetter("a.factor")
    return lambda: get(state), lambda: setattr(state.a, "factor", 2.0)


@_state
def cell_of_a_closure() -> Any:
    factor = 1.0

    def read() -> float:
        return factor

    def alter() -> None:
        nonlocal factor
        factor = 2.0

    return read, alter


@_state
def cell_set_from_outside() -> Any:
    factor = 1.0

    def read() -> float:
        return factor

    assert read.__closure__ is not None
    return read, lambda: setattr(read.__closure__[0], "cell_contents", 2.0)


@_state
def cell_of_a_closure_within() -> Any:
    factor = 1.0

    def outer() -> float:
        def inner() -> float:
            return factor

        return inner()

    def alter() -> None:
        nonlocal factor
        factor = 2.0

    return outer, alter


@_state
def default_of_a_function() -> Any:
    def read(factor: float = 1.0) -> float:
        return factor

    return read, lambda: setattr(read, "__defaults__", (2.0,))


@_state
def list_as_a_default() -> Any:
    def read(factors: list[float] = [1.0]) -> float:  # noqa: B006
        return factors[0]

    return read, lambda: read.__defaults__[0].__setitem__(0, 2.0)  # type: ignore[index]


@_state
def keyword_default_of_a_function() -> Any:
    def read(*, factor: float = 1.0) -> float:
        return factor

    return read, lambda: read.__kwdefaults__.update(factor=2.0)


@_state
def attribute_of_a_function() -> Any:
    def read() -> float:
        return read.factor  # type: ignore[attr-defined]

    read.factor = 1.0  # type: ignore[attr-defined]
    return read, lambda: setattr(read, "factor", 2.0)


@_state
def attribute_of_a_helper() -> Any:
    """A function within the closure of another keeps it."""

    def helper() -> float:
        return 1.0

    helper.kept = [1.0]  # type: ignore[attr-defined]
    return lambda: helper.kept[0], lambda: helper.kept.__setitem__(0, 2.0)  # type: ignore[attr-defined]


@_state
def code_of_a_helper_of_a_helper() -> Any:
    def ground() -> float:
        return 1.0

    def middle() -> float:
        return ground()

    def other() -> float:
        return 2.0

    return lambda: middle(), lambda: setattr(ground, "__code__", other.__code__)


@_state
def constant_of_code_alone() -> Any:
    """Only a number within the code differs."""

    def read() -> float:
        return 1.0

    code = read.__code__
    constants = tuple(2.0 if c == 1.0 else c for c in code.co_consts)
    return read, lambda: setattr(read, "__code__", code.replace(co_consts=constants))


@_state
def arguments_of_a_partial() -> Any:
    def take(factors: list[float]) -> float:
        return factors[0]

    factors = [1.0]
    return functools.partial(take, factors), lambda: factors.__setitem__(0, 2.0)


@_state
def partial_set_anew() -> Any:
    def take(factor: float) -> float:
        return factor

    read = functools.partial(take, 1.0)
    return read, lambda: read.__setstate__((take, (2.0,), {}, {}))


@_state
def registry_of_a_generic_function() -> Any:
    @functools.singledispatch
    def read(x: object) -> float:
        return 1.0

    return lambda: read(3), lambda: read.register(int, lambda x: 2.0) and None


@_state
def object_that_is_called() -> Any:
    class Reader:
        factor = 1.0

        def __call__(self) -> float:
            return self.factor

    read = Reader()
    return read, lambda: setattr(read, "factor", 2.0)


@_state
def call_of_an_objects_class() -> Any:
    class Reader:
        def __call__(self) -> float:
            return 1.0

    read = Reader()
    return read, lambda: setattr(Reader, "__call__", lambda self: 2.0)


@_state
def object_of_a_bound_method() -> Any:
    class Reader:
        factor = 1.0

        def get(self) -> float:
            return self.factor

    reader = Reader()
    return reader.get, lambda: setattr(reader, "factor", 2.0)


@_state
def method_of_a_builtin() -> Any:
    state = {"a": 1.0}
    return functools.partial(state.get, "a"), lambda: state.update(a=2.0)


@_state
def method_of_a_list() -> Any:
    state = [1.0]
    return functools.partial(state.__getitem__, 0), lambda: state.__setitem__(0, 2.0)


@_state
def static_method() -> Any:
    class Reader:
        @staticmethod
        def get() -> float:
            return 1.0

    return lambda: Reader.get(), lambda: setattr(Reader, "get", staticmethod(lambda: 2.0))


@_state
def class_method() -> Any:
    class Reader:
        factor = 1.0

        @classmethod
        def get(cls) -> float:
            return cls.factor

    return Reader.get, lambda: setattr(Reader, "factor", 2.0)


@_state
def class_of_an_object() -> Any:
    class One:
        factor = 1.0

    class Two:
        factor = 2.0

    state: Any = One()
    return lambda: state.factor, lambda: setattr(state, "__class__", Two)


@_state
def comparison_of_ones_own() -> Any:
    """A value that says it equals any other."""

    class Same:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 1

        def __repr__(self) -> str:
            return "Same"

    state = [Same(1.0)]
    return lambda: state[0].factor, lambda: state.__setitem__(0, Same(2.0))


@_state
def true_for_one() -> Any:
    """1.0 == True, yet one is of another type than the other."""
    state: list[Any] = [1.0]
    return (
        lambda: 1.0 if type(state[0]) is float else 2.0,
        lambda: state.__setitem__(0, True),
    )


@_state
def minus_zero() -> Any:
    state = [0.0]
    return lambda: 1.0 if str(state[0]) == "0.0" else 2.0, lambda: state.__setitem__(0, -0.0)


@_state
def weakly_held_object() -> Any:
    class Settings:
        factor = 1.0

    state = Settings()
    weak = weakref.ref(state)
    return lambda: weak().factor, lambda: setattr(state, "factor", 2.0)  # type: ignore[union-attr]


@_state
def proxy() -> Any:
    class Settings:
        factor = 1.0

    state = Settings()
    weak = weakref.proxy(state)
    return lambda: weak.factor, lambda: setattr(state, "factor", 2.0)


@_state
def dict_of_weak_values() -> Any:
    class Settings:
        factor = 1.0

    state = Settings()
    weak = weakref.WeakValueDictionary({"a": state})
    return lambda: weak["a"].factor, lambda: setattr(state, "factor", 2.0)


@_state
def dict_of_weak_keys() -> Any:
    class Key:
        pass

    key = Key()
    weak = weakref.WeakKeyDictionary({key: 1.0})
    return lambda: weak[key], lambda: weak.update({key: 2.0})


@_state
def itself_in_a_circle() -> Any:
    state: Any = {"factor": 1.0}
    state["me"] = state
    return lambda: state["me"]["me"]["factor"], lambda: state.update(factor=2.0)


@_state
def global_number() -> Any:
    def alter() -> Any:
        globals()["FACTOR"] = 2.0
        return lambda: globals().update(FACTOR=1.0)

    return lambda: FACTOR, alter


@_state
def element_of_a_global_list() -> Any:
    def alter() -> Any:
        FACTORS[0] = 2.0
        return lambda: FACTORS.__setitem__(0, 1.0)

    return lambda: FACTORS[0], alter


@_state
def nested_in_a_global_dict() -> Any:
    def alter() -> Any:
        SETTINGS["scale"]["factor"] = 2.0
        return lambda: SETTINGS["scale"].update(factor=1.0)

    return lambda: SETTINGS["scale"]["factor"], alter


@_state
def global_tensor() -> Any:
    def alter() -> Any:
        VECTOR.data.fill_(2)
        return lambda: VECTOR.data.fill_(1)

    return lambda: VECTOR.item(), alter


def _factor() -> float:
    return FACTOR


@_state
def global_function() -> Any:
    def alter() -> Any:
        plain = globals()["_factor"]
        globals()["_factor"] = lambda: 2.0
        return lambda: globals().update(_factor=plain)

    return lambda: _factor(), alter


@_state
def global_that_did_not_exist() -> Any:
    def alter() -> Any:
        globals()["LATER"] = 2.0
        return lambda: globals().pop("LATER")

    return lambda: LATER if "LATER" in globals() else 1.0, alter  # type: ignore[name-defined]  # noqa: F821


@_state
def global_by_name() -> Any:
    def alter() -> Any:
        globals()["FACTOR"] = 2.0
        return lambda: globals().update(FACTOR=1.0)

    return lambda: globals()["FACTOR"], alter


@_state
def global_by_evaluation() -> Any:
    def alter() -> Any:
        globals()["FACTOR"] = 2.0
        return lambda: globals().update(FACTOR=1.0)

    return lambda: eval("FACTOR"), alter


@_state
def global_found_by_an_import_within() -> Any:
    def read() -> float:
        from tests.connectors.transformers.mutations.state import FACTOR as found

        return found

    def alter() -> Any:
        globals()["FACTOR"] = 2.0
        return lambda: globals().update(FACTOR=1.0)

    return read, alter


@_state
def attribute_of_a_module() -> Any:
    MODULE.factor = 1.0  # type: ignore[attr-defined]
    return lambda: MODULE.factor, lambda: setattr(MODULE, "factor", 2.0)


@_state
def attribute_of_a_module_in_a_closure() -> Any:
    settings: Any = types.ModuleType("lmcache_test_more_settings")
    settings.factor = 1.0
    return lambda: settings.factor, lambda: setattr(settings, "factor", 2.0)


@_state
def module_in_the_list_of_modules() -> Any:
    settings: Any = types.ModuleType("lmcache_test_late")
    settings.factor = 1.0
    sys.modules["lmcache_test_late"] = settings

    def alter() -> Any:
        settings.factor = 2.0
        return lambda: sys.modules.pop("lmcache_test_late")

    return lambda: sys.modules["lmcache_test_late"].factor, alter


@_state
def variable_of_the_context() -> Any:
    def alter() -> Any:
        token = CONTEXT.set(2.0)
        return lambda: CONTEXT.reset(token)

    return CONTEXT.get, alter


@_state
def variable_of_the_context_of_a_list() -> Any:
    variable: contextvars.ContextVar[list[float]] = contextvars.ContextVar("factors")
    state = [1.0]
    variable.set(state)
    return lambda: variable.get()[0], lambda: state.__setitem__(0, 2.0)


@_state
def variable_of_the_thread() -> Any:
    LOCAL.factor = 1.0
    return lambda: LOCAL.factor, lambda: setattr(LOCAL, "factor", 2.0)


@_state
def variable_of_the_environment() -> Any:
    def alter() -> Any:
        os.environ["LMCACHE_TEST_FACTOR"] = "2"
        return lambda: os.environ.pop("LMCACHE_TEST_FACTOR")

    return lambda: float(os.environ.get("LMCACHE_TEST_FACTOR", "1")), alter


@_state
def variable_of_the_environment_by_getenv() -> Any:
    def alter() -> Any:
        os.environ["LMCACHE_TEST_FACTOR"] = "2"
        return lambda: os.environ.pop("LMCACHE_TEST_FACTOR")

    return lambda: float(os.getenv("LMCACHE_TEST_FACTOR", "1")), alter


@_state
def state_of_a_generator() -> Any:
    """Each call of next gives the same number until it is told another."""

    def numbers() -> Iterator[float]:
        factor = 1.0
        while True:
            factor = (yield factor) or factor

    state: Any = numbers()
    next(state)
    return lambda: next(state), lambda: state.send(2.0) and None


@_state
def result_that_was_kept() -> Any:
    """A cache of results, emptied after what they came from has changed."""
    state = [1.0]

    @functools.lru_cache
    def read() -> float:
        return state[0]

    def alter() -> None:
        state[0] = 2.0
        read.cache_clear()

    read()
    return read, alter


# On modules


@mutation()
def attribute_of_a_module_of_the_model(model: Any) -> Iterator[Any]:
    block = reads(model, lambda: 1.0)
    block.read = lambda: block.factor
    block.factor = 1.0
    yield
    block.factor = 2.0


@mutation()
def tensor_that_is_no_parameter(model: Any) -> Iterator[Any]:
    block = reads(model, lambda: block.vector)
    block.vector = torch.ones(256, dtype=model.dtype)
    yield
    block.vector.data[17] = 2


@mutation()
def module_in_a_plain_list(model: Any) -> Iterator[Any]:
    hidden = torch.nn.Linear(256, 256, bias=False, dtype=model.dtype)
    block = reads(model, lambda: 1.0)
    block.others = [hidden]
    block.read = lambda: block.others[0].weight[0]
    yield
    hidden.weight.data[0] *= 2


@mutation()
def module_in_a_closure(model: Any) -> Iterator[Any]:
    hidden = torch.nn.Linear(256, 256, bias=False, dtype=model.dtype)
    reads(model, lambda: hidden.weight[0])
    yield
    hidden.weight.data[0] *= 2


@mutation()
def module_that_two_layers_share(model: Any) -> Iterator[Any]:
    shared = reads(model, lambda: shared.factor)
    shared.factor = 1.0
    model.get_decoder().layers[1].self_attn.o_proj = shared
    yield
    shared.factor = 2.0


@mutation()
def list_and_dict_of_parameters(model: Any) -> Iterator[Any]:
    block = reads(model, lambda: block.some[0] * block.more["a"])
    block.some = torch.nn.ParameterList([torch.ones(256, dtype=model.dtype)])
    block.more = torch.nn.ParameterDict({"a": torch.ones(256, dtype=model.dtype)})
    yield
    block.more["a"].data[3] = 2


@mutation()
def module_that_refers_to_the_model(model: Any) -> Iterator[Any]:
    """A cycle: a block asks the model that it is part of."""
    object.__setattr__(model, "factor", 1.0)
    reads(model, lambda: model.factor)
    yield
    model.factor = 2.0


@mutation()
def attribute_of_the_config(model: Any) -> Iterator[Any]:
    model.config.steering = 1.0
    reads(model, lambda: model.config.steering)
    yield
    model.config.steering = 2.0


@mutation()
def attribute_of_the_generation_config(model: Any) -> Iterator[Any]:
    """It decides no KV, unless somebody's forward reads it."""
    model.generation_config.steering = 1.0
    reads(model, lambda: model.generation_config.steering)
    yield
    model.generation_config.steering = 2.0


@mutation()
def flag_that_libraries_keep_on_a_module(model: Any) -> Iterator[Any]:
    """A forward that reads what nobody else's reads."""
    first(model).gradient_checkpointing = False
    layer = first(model)
    reads(model, lambda: 2.0 if layer.gradient_checkpointing else 1.0)
    yield
    layer.gradient_checkpointing = True
    yield
    layer.gradient_checkpointing = False


@mutation()
def flag_of_training_that_is_read(model: Any) -> Iterator[Any]:
    layer = output(model)
    reads(model, lambda: 2.0 if layer.training else 1.0)
    yield
    layer.train()


# Files and the like: code that reads them is refused, and has to be


@mutation(refused=True)
def a_file(model: Any) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "factor"
        path.write_text("1")
        reads(model, lambda: float(path.read_text()))
        yield
        path.write_text("2")
        yield


@mutation(refused=True)
def a_file_by_name(model: Any) -> Iterator[Any]:
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("1")
        file.flush()
        name = file.name
        reads(model, lambda: float(open(name).read()))  # noqa: SIM115
        yield
        file.write("2")
        file.flush()
        yield


@mutation(refused=True)
def a_pipe(model: Any) -> Iterator[Any]:
    """As from another process or the network."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    last = [1.0]

    def ask() -> float:
        with contextlib.suppress(BlockingIOError):
            last[0] = float(os.read(read, 10))
        return last[0]

    reads(model, ask)
    yield
    os.write(write, b"2")
    yield
    os.close(read)
    os.close(write)


@mutation(refused=True)
def what_a_function_of_a_file_gives(model: Any) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "factor.npy")
        numpy.save(path, numpy.ones(1))
        reads(model, lambda: float(numpy.load(path)[0]))
        yield
        numpy.save(path, numpy.full(1, 2.0))
        yield


@mutation(refused=True)
def whether_a_file_is_there(model: Any) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "flag")
        reads(model, lambda: 2.0 if os.path.exists(path) else 1.0)
        yield
        open(path, "w").close()
        yield
