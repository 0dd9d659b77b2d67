"""Code, exchanged at every place where forward may find it."""

from __future__ import annotations

import builtins
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.connectors.transformers.mutations import first, mutation, output

functional = torch.nn.functional


def _modelling(model: Any) -> Any:
    """The module of the model's family."""
    return importlib.import_module(type(model).__module__)


def _doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def doubled(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * 2

    return doubled


def _doubled_first(function: Callable[..., Any]) -> Callable[..., Any]:
    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return (out[0] * 2, *out[1:])

    return doubled


# Of an instance


@mutation()
def forward_of_an_instance(model: Any) -> None:
    layer = output(model)
    layer.forward = _doubled(layer.forward)


@mutation()
def forward_of_an_attention(model: Any) -> None:
    attention = first(model).self_attn
    attention.forward = _doubled_first(attention.forward)


@mutation()
def forward_of_a_layer(model: Any) -> None:
    layer = first(model)
    layer.forward = _doubled(layer.forward)


@mutation()
def forward_of_the_decoder(model: Any) -> None:
    forward = model.model.forward

    @functools.wraps(forward)
    def other_tokens(*args: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, input_ids=(input_ids + 1) % 256, **kwargs)

    model.model.forward = other_tokens


@mutation()
def forward_of_the_model(model: Any) -> None:
    forward = model.forward

    @functools.wraps(forward)
    def other_tokens(*args: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, input_ids=(input_ids + 1) % 256, **kwargs)

    model.forward = other_tokens


@mutation()
def forward_bound_to_an_instance(model: Any) -> None:
    layer = output(model)
    plain = type(layer).forward
    layer.forward = types.MethodType(lambda self, x: plain(self, x) * 2, layer)


@mutation()
def forward_put_into_the_dict(model: Any) -> None:
    layer = output(model)
    layer.__dict__["forward"] = _doubled(layer.forward)


@mutation()
def helper_method_of_an_instance(model: Any) -> Iterator[Any]:
    class Helped(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(super().forward(x))

        def after(self, x: torch.Tensor) -> torch.Tensor:
            return x

    layer = output(model)
    layer.__class__ = Helped
    yield
    layer.after = lambda x: x * 2


@mutation()
def inputs_prepared_otherwise(model: Any) -> None:
    plain = model.prepare_inputs_for_generation

    def prepare(*args: Any, **kwargs: Any) -> Any:
        inputs = plain(*args, **kwargs)
        return {**inputs, "input_ids": (inputs["input_ids"] + 1) % 256}

    model.prepare_inputs_for_generation = prepare


@mutation()
def inputs_prepared_otherwise_by_the_class(model: Any) -> Iterator[Any]:
    yield
    plain = GenerationMixin.prepare_inputs_for_generation

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = plain(self, *args, **kwargs)
        return {**inputs, "input_ids": (inputs["input_ids"] + 1) % 256}

    with mock.patch.object(GenerationMixin, "prepare_inputs_for_generation", prepare):
        yield


@mutation()
def positions_prepared_otherwise(model: Any) -> None:
    plain = model.prepare_inputs_for_generation

    def prepare(*args: Any, **kwargs: Any) -> Any:
        inputs = plain(*args, **kwargs)
        return {**inputs, "position_ids": inputs["position_ids"] * 2}

    model.prepare_inputs_for_generation = prepare


@mutation()
def prefill_of_ones_own(model: Any) -> None:
    """The step of generate that computes the prompt."""
    plain = model._prefill

    def prefill(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return plain((input_ids + 1) % 256, *args, **kwargs)

    model._prefill = prefill


@mutation()
def call_of_an_instance(model: Any) -> None:
    layer = output(model)
    layer._call_impl = _doubled(layer._call_impl)


@mutation("llama", "gemma3")
def activation_of_an_instance(model: Any) -> None:
    del first(model).mlp.act_fn
    first(model).mlp.act_fn = torch.relu


# Of a class


def _patched(owner: Any, name: str, wrap: Callable[[Any], Any] = _doubled) -> Iterator[Any]:
    """A patch of something that reaches beyond the model."""
    yield
    with mock.patch.object(owner, name, wrap(getattr(owner, name))):
        yield


@mutation()
def forward_of_a_class(model: Any) -> Iterator[Any]:
    yield from _patched(type(first(model).input_layernorm), "forward")


@mutation()
def forward_of_the_attention_class(model: Any) -> Iterator[Any]:
    yield from _patched(type(first(model).self_attn), "forward", _doubled_first)


@mutation()
def forward_of_the_layer_class(model: Any) -> Iterator[Any]:
    yield from _patched(type(first(model)), "forward")


@mutation("llama", "mixtral", "deepseek_v3")
def forward_of_the_rotary_class(model: Any) -> Iterator[Any]:
    yield from _patched(type(model.model.rotary_emb), "forward", _doubled_first)


@mutation()
def forward_of_torchs_linear(model: Any) -> Iterator[Any]:
    yield from _patched(torch.nn.Linear, "forward")


@mutation()
def forward_of_torchs_embedding(model: Any) -> Iterator[Any]:
    yield from _patched(torch.nn.Embedding, "forward")


@mutation()
def forward_of_a_base_class(model: Any) -> Iterator[Any]:
    class Base(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    class Derived(Base):
        pass

    output(model).__class__ = Derived
    yield
    Base.forward = _doubled(Base.forward)


@mutation()
def method_of_a_base_class(model: Any) -> Iterator[Any]:
    class Base(torch.nn.Linear):
        def after(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Derived(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(super().forward(x))

    output(model).__class__ = Derived
    yield
    Base.after = lambda self, x: x * 2


@mutation()
def forward_that_a_derived_class_hides(model: Any) -> Iterator[Any]:
    class Base(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight)

    class Derived(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    output(model).__class__ = Derived
    yield
    Base.forward = _doubled(Base.forward)


@mutation()
def forward_of_torchs_embedding_that_is_hidden(model: Any) -> Iterator[Any]:
    class Scaled(torch.nn.Embedding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.0

    model.get_input_embeddings().__class__ = Scaled
    yield from _patched(torch.nn.Embedding, "forward")


def _hidden(model: Any, hiding: Any, hidden: Any, other: Any) -> Iterator[Any]:
    """`scale` of a class that hides its mixin's `scale`, which changes."""

    class Mixin:
        scale = hidden

    class Scaled(Mixin, torch.nn.Linear):
        scale = hiding

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = self.scale() if callable(self.scale) else self.scale
            return torch.nn.Linear.forward(self, x) * scale

    output(model).__class__ = Scaled
    yield
    Mixin.scale = other


def _above(self: Any) -> Any:
    """What a property hides."""
    return super(type(self), self).scale


@mutation()
def method_of_a_mixin_that_is_hidden(model: Any) -> Iterator[Any]:
    yield from _hidden(model, lambda self: _above(self)(), lambda self: 1.0, lambda self: 2.0)


@mutation()
def class_method_of_a_mixin_that_is_hidden(model: Any) -> Iterator[Any]:
    above = classmethod(lambda kind: super(kind, kind).scale())
    one, two = classmethod(lambda kind: 1.0), classmethod(lambda kind: 2.0)
    yield from _hidden(model, above, one, two)


@mutation()
def static_method_of_a_mixin_that_is_hidden(model: Any) -> Iterator[Any]:
    one, two = staticmethod(lambda: 1.0), staticmethod(lambda: 2.0)
    yield from _hidden(model, lambda self: _above(self)(), one, two)


@mutation()
def property_of_a_mixin_that_is_hidden(model: Any) -> Iterator[Any]:
    one, two = property(lambda self: 1.0), property(lambda self: 2.0)
    yield from _hidden(model, property(_above), one, two)


@mutation()
def attribute_of_a_mixin_that_is_hidden(model: Any) -> Iterator[Any]:
    yield from _hidden(model, property(_above), 1.0, 2.0)


@mutation()
def method_of_a_helpers_base_that_is_hidden(model: Any) -> Iterator[Any]:
    """An object that is called, and calls what its class hides."""

    class Base:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Derived(Base):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x)

    class Helped(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(super().forward(x))

    output(model).__class__ = Helped
    output(model).after = Derived()
    yield
    Base.__call__ = lambda self, x: x * 2


@mutation()
def attribute_of_a_metaclass(model: Any) -> Iterator[Any]:
    class Above(type):
        factor = 1.0

    class Meta(Above):
        pass

    class Scaled(torch.nn.Linear, metaclass=Meta):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * type(self).factor

    output(model).__class__ = Scaled
    yield
    Above.factor = 2.0


@mutation()
def object_that_a_class_has_for_a_method(model: Any) -> Iterator[Any]:
    class Scale:
        factor = 1.0

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    class Helper:
        __call__ = Scale()

    class Helped(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(super().forward(x))

    output(model).__class__ = Helped
    output(model).after = Helper()
    yield
    Helper.__call__.factor = 2.0


@mutation()
def classes_of_one_name_change_places(model: Any) -> Iterator[Any]:
    """Two that a function made; neither they nor the weights change."""

    def scaled(factor: float) -> type:
        class Scaled(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * factor

        return Scaled

    one, other = model.get_decoder().layers[:2]
    for layer, factor in ((one, 1.0), (other, 2.0)):
        layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.o_proj, scaled(factor)())
    model.eval()
    yield
    first_scale, second_scale = one.self_attn.o_proj, other.self_attn.o_proj
    first_scale[1], second_scale[1] = second_scale[1], first_scale[1]


@mutation()
def method_of_transformers_that_somebody_replaced(model: Any) -> Iterator[Any]:
    """One that drives models, and hands the attention to its layers."""
    registry = type(ALL_ATTENTION_FUNCTIONS)
    plain = registry.get_interface

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _doubled_first(plain(self, *args, **kwargs))

    yield
    with mock.patch.object(registry, "get_interface", other):
        yield


@mutation()
def method_that_comes_before_another(model: Any) -> Iterator[Any]:
    """A derived class gets a method that its base had alone."""

    class Base(torch.nn.Linear):
        def after(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(super().forward(x))

    class Derived(Base):
        pass

    output(model).__class__ = Derived
    yield
    Derived.after = lambda self, x: x * 2


@mutation()
def class_of_an_instance(model: Any) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    output(model).__class__ = Doubled


@mutation()
def bases_of_a_class(model: Any) -> Iterator[Any]:
    class One(torch.nn.Linear):
        def after(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Two(torch.nn.Linear):
        def after(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    class Derived(One):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(torch.nn.Linear.forward(self, x))

    output(model).__class__ = Derived
    yield
    Derived.__bases__ = (Two,)


@mutation()
def call_of_every_module(model: Any) -> Iterator[Any]:
    yield
    plain, target = torch.nn.Module.__call__, output(model)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        return out * 2 if self is target else out

    with mock.patch.object(torch.nn.Module, "__call__", call):
        yield


@mutation()
def attribute_access_of_a_class(model: Any) -> Iterator[Any]:
    """`__getattr__` decides which weight forward sees."""

    class Other(torch.nn.Linear):
        pass

    layer = output(model)
    layer.__class__ = Other
    yield
    plain = torch.nn.Module.__getattr__

    def other(self: Any, name: str) -> Any:
        value = plain(self, name)
        return value * 2 if name == "weight" else value

    Other.__getattr__ = other


@mutation()
def attribute_access_of_an_instance(model: Any) -> Iterator[Any]:
    class Other(torch.nn.Linear):
        def __getattribute__(self, name: str) -> Any:
            return vars(self)["factor"] if name == "scale" else super().__getattribute__(name)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    layer = output(model)
    layer.factor = 1.0
    layer.__class__ = Other
    yield
    layer.factor = 2.0


@mutation()
def forward_of_another_module(model: Any) -> None:
    """A bound method, and the module that it is bound to hangs nowhere else."""
    torch.manual_seed(2)
    other = torch.nn.Embedding(256, 256, dtype=model.dtype)
    model.get_input_embeddings().forward = other.forward


@mutation()
def module_behind_a_bound_method(model: Any) -> Iterator[Any]:
    torch.manual_seed(2)
    other = torch.nn.Linear(256, 256, dtype=model.dtype)
    layer = output(model)
    plain = layer.forward
    layer.forward = lambda x: plain(x) + other.forward(plain(x))
    layer.__dict__["forward"] = layer.forward
    yield
    other.weight.data[3] *= 2


# Of a module


@mutation()
def helper_of_the_family(model: Any) -> Iterator[Any]:
    name = "rotate_half" if hasattr(_modelling(model), "rotate_half") else "apply_rotary_pos_emb"
    if "deepseek" in type(model).__module__:
        name = "apply_rotary_pos_emb_interleave"
        yield from _patched(_modelling(model), name, _doubled_first)
        return
    yield from _patched(_modelling(model), name)


@mutation()
def positions_of_the_family(model: Any) -> Iterator[Any]:
    name = "apply_rotary_pos_emb"
    if "deepseek" in type(model).__module__:
        name = "apply_rotary_pos_emb_interleave"

    def swapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def other(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
            return function(q, k, sin, cos, *args, **kwargs)

        return other

    yield from _patched(_modelling(model), name, swapped)


@mutation()
def mask_of_the_family(model: Any) -> Iterator[Any]:
    """No token sees those before the one before it."""

    def narrow(function: Callable[..., Any]) -> Callable[..., Any]:
        def other(*args: Any, **kwargs: Any) -> Any:
            embeddings = kwargs["inputs_embeds"]
            cache = kwargs.get("cache")
            past = cache.get_seq_length() if cache is not None else 0
            rows = torch.arange(embeddings.shape[1])[:, None] + past
            columns = torch.arange(embeddings.shape[1] + past)
            return ((columns <= rows) & (columns > rows - 2))[None, None]

        return other

    yield from _patched(_modelling(model), "create_causal_mask", narrow)


@mutation()
def code_of_a_helper(model: Any) -> Iterator[Any]:
    """The function stays the same object."""
    yield
    helper = _modelling(model).apply_rotary_pos_emb
    if "deepseek" in type(model).__module__:
        helper = _modelling(model).apply_rotary_pos_emb_interleave
    helper = getattr(helper, "__wrapped__", helper)
    plain = helper.__code__

    def other(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):  # type: ignore[no-untyped-def]
        return q * 2, k * 2

    def without(q, k, cos, sin, unsqueeze_dim=1):  # type: ignore[no-untyped-def]
        return q * 2, k * 2

    helper.__code__ = (other if plain.co_argcount == 6 else without).__code__
    yield
    helper.__code__ = plain


@mutation()
def defaults_of_forward(model: Any) -> Iterator[Any]:
    class Scaling(torch.nn.Linear):
        def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
            return super().forward(x) * factor

    output(model).__class__ = Scaling
    yield
    Scaling.forward.__defaults__ = (2.0,)


@mutation()
def keyword_defaults_of_forward(model: Any) -> Iterator[Any]:
    class Scaling(torch.nn.Linear):
        def forward(self, x: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
            return super().forward(x) * factor

    output(model).__class__ = Scaling
    yield
    Scaling.forward.__kwdefaults__ = {"factor": 2.0}


@mutation()
def value_of_a_patch_that_looks_like_torchs(model: Any) -> Iterator[Any]:
    """`functools.wraps` gives a patch the name and the module of what it replaces."""
    plain, scale = functional.linear, {"factor": 1.0}

    @functools.wraps(torch.nn.Linear.forward)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return plain(x, self.weight, self.bias) * scale["factor"]

    with mock.patch.object(torch.nn.Linear, "forward", forward):
        yield
        scale["factor"] = 2.0
        yield


@mutation()
def wrapped_of_a_decorated_forward(model: Any) -> Iterator[Any]:
    """A decorator that asks `__wrapped__` each time."""

    def late(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return call.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]

        return call

    class Decorated(torch.nn.Linear):
        @late
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.Linear.forward(self, x)

    output(model).__class__ = Decorated
    yield
    Decorated.forward.__wrapped__ = lambda self, x: torch.nn.Linear.forward(self, x) * 2


@mutation("llama", "mixtral")
def functional_silu(model: Any) -> Iterator[Any]:
    yield from _patched(functional, "silu")


@mutation("gemma3", alters=False)
def functional_gelu(model: Any) -> Iterator[Any]:
    """The activation took it when it was made."""
    yield from _patched(functional, "gelu")


@mutation()
def functional_linear(model: Any) -> Iterator[Any]:
    yield from _patched(functional, "linear")


@mutation()
def functional_attention(model: Any) -> Iterator[Any]:
    yield from _patched(functional, "scaled_dot_product_attention")


@mutation("mixtral")
def functional_softmax(model: Any) -> Iterator[Any]:
    def sharper(function: Callable[..., Any]) -> Callable[..., Any]:
        def other(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return function(x * 5, *args, **kwargs)

        return other

    yield from _patched(functional, "softmax", sharper)


@mutation()
def function_of_torch(model: Any) -> Iterator[Any]:
    yield from _patched(torch, "rsqrt")


@mutation()
def method_of_all_tensors(model: Any) -> Iterator[Any]:
    yield from _patched(torch.Tensor, "pow")


@mutation("llama", "gemma3", "mixtral")
def operator_of_all_tensors(model: Any) -> Iterator[Any]:
    plain = torch.Tensor.__add__

    def add(self: Any, other: Any) -> Any:
        out = plain(self, other)
        return out * 2 if out.dim() == 3 and out.shape[2] == 256 else out

    yield
    with mock.patch.object(torch.Tensor, "__add__", add):
        yield


@mutation("llama", "gemma3")
def activation_of_the_library(model: Any) -> Iterator[Any]:
    activation = type(first(model).mlp.act_fn)
    yield from _patched(activation, "forward")


@mutation("llama")
def activation_by_name(model: Any) -> Iterator[Any]:
    """A block that looks its activation up at each call."""

    class Named(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ACT2FN["silu"](x)

    first(model).mlp.act_fn = Named().eval()
    yield
    plain = dict.__getitem__(ACT2FN, "silu")
    ACT2FN["silu"] = torch.nn.ReLU
    yield
    ACT2FN["silu"] = plain


@mutation()
def attention_in_the_registry(model: Any) -> Iterator[Any]:
    yield
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def other(*args: Any, **kwargs: Any) -> Any:
        out, weights = plain(*args, **kwargs)
        return out * 2, weights

    mapping = type(ALL_ATTENTION_FUNCTIONS)._global_mapping
    with mock.patch.dict(mapping, {"sdpa": other}):
        yield


@mutation()
def attention_in_the_local_registry(model: Any) -> Iterator[Any]:
    yield
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def other(*args: Any, **kwargs: Any) -> Any:
        out, weights = plain(*args, **kwargs)
        return out * 2, weights

    ALL_ATTENTION_FUNCTIONS["sdpa"] = other
    yield
    del ALL_ATTENTION_FUNCTIONS["sdpa"]


@mutation()
def attention_of_ones_own(model: Any) -> Iterator[Any]:
    """Registered, used, and registered anew under its name."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def one(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    def two(*args: Any, **kwargs: Any) -> Any:
        out, weights = plain(*args, **kwargs)
        return out * 2, weights

    ALL_ATTENTION_FUNCTIONS.register("mine", one)
    ALL_MASK_ATTENTION_FUNCTIONS.register("mine", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("mine")
    yield
    ALL_ATTENTION_FUNCTIONS.register("mine", two)
    yield
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        registry._global_mapping.pop("mine", None)
        registry._local_mapping.pop("mine", None)


@mutation()
def mask_in_the_registry(model: Any) -> Iterator[Any]:
    yield
    model.set_attn_implementation("eager")
    with mock.patch.dict(
        type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping,
        {"eager": lambda *args, **kwargs: None},
    ):
        yield


@mutation("mixtral", "deepseek_v3")
def experts_of_the_registry(model: Any) -> Iterator[Any]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as registry

    yield
    name = model.config._experts_implementation
    plain = registry._global_mapping.get(name)
    if plain is None:
        experts = type(model.get_decoder().layers[-1].mlp.experts)
        with mock.patch.object(experts, "forward", _doubled(experts.forward)):
            yield
        return
    with mock.patch.dict(registry._global_mapping, {name: _doubled(plain)}):
        yield


@mutation()
def builtin_of_python(model: Any) -> Iterator[Any]:
    class Rounding(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * round(1.0)

    output(model).__class__ = Rounding
    yield
    with mock.patch.object(builtins, "round", lambda x: x * 2):
        yield


@mutation()
def function_of_autograd(model: Any) -> Iterator[Any]:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1.0

        @staticmethod
        def backward(context: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    class Applied(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Scale.apply(super().forward(x))

    output(model).__class__ = Applied
    yield
    Scale.forward = staticmethod(lambda context, x: x * 2.0)


@mutation()
def graph_of_fx(model: Any) -> Iterator[Any]:
    layer = torch.fx.symbolic_trace(torch.nn.Sequential(output(model), torch.nn.Tanh()))
    first(model).self_attn.o_proj = layer.eval()
    yield
    node = next(node for node in layer.graph.nodes if node.target == "1")
    node.replace_all_uses_with(node.args[0])
    layer.graph.erase_node(node)
    layer.recompile()


@mutation(refused=True)
def scripted_module(model: Any) -> Iterator[Any]:
    first(model).self_attn.o_proj = torch.jit.trace(
        output(model), torch.zeros(1, 1, output(model).in_features, dtype=model.dtype)
    )
    yield
    for parameter in output(model).parameters():
        parameter.data.mul_(1.5)
