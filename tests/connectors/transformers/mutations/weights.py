"""Weights and buffers, changed by every road that leads to their bytes."""

from __future__ import annotations

import copy
import ctypes
import io
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tests.connectors.transformers.mutations import first, mutation, output, values
from tests.connectors.transformers.tiny import PROMPT


def _numpy(tensor: torch.Tensor) -> Any:
    """The same memory as 16-bit or 32-bit integers."""
    width = torch.int16 if tensor.element_size() == 2 else torch.int32
    return tensor.detach().view(width).numpy()


@mutation()
def data_scaled(model: Any) -> None:
    output(model).weight.data.mul_(1.5)


@mutation()
def data_sign_flipped(model: Any) -> None:
    output(model).weight.data.neg_()


@mutation()
def data_rows_permuted(model: Any) -> None:
    weight = output(model).weight.data
    weight.copy_(weight[torch.arange(weight.shape[0] - 1, -1, -1)])


@mutation()
def data_two_neighbours_swapped(model: Any) -> None:
    row = output(model).weight.data[77]
    row[100:102] = row[100:102].flip(0)


@mutation()
def data_two_far_rows_swapped(model: Any) -> None:
    weight = output(model).weight.data
    weight[[3, 201]] = weight[[201, 3]]


@mutation()
def data_one_element(model: Any) -> None:
    values(model).weight.data[11, 123] += 0.5


@mutation()
def data_first_element(model: Any) -> None:
    values(model).weight.data.view(-1)[0] += 0.5


@mutation()
def data_last_element(model: Any) -> None:
    values(model).weight.data.view(-1)[-1] += 0.5


@mutation(alters=None)  # in bfloat16 what is rounded away depends on the sum
def data_one_ulp(model: Any) -> None:
    _numpy(values(model).weight.data)[11, 123] += 1


@mutation()
def data_one_ulp_of_each_of_a_row(model: Any) -> None:
    _numpy(values(model).weight.data)[11] += 1


@mutation()
def data_one_bit_of_an_exponent(model: Any) -> None:
    weight = _numpy(values(model).weight.data)
    weight[11, 123] ^= 1 << (8 * weight.itemsize - 3)


@mutation()
def data_sum_preserved(model: Any) -> None:
    weight = values(model).weight.data
    weight[11, 123] += 0.25
    weight[11, 124] -= 0.25


@mutation()
def data_two_elements_of_one_column_exchanged(model: Any) -> None:
    weight = _numpy(values(model).weight.data)
    weight[[3, 9], 100] = weight[[9, 3], 100]


@mutation()
def data_block_moved_to_another_place(model: Any) -> None:
    weight = _numpy(output(model).weight.data)
    corner = weight[:32, :32].copy()
    weight[:32, :32], weight[64:96, 64:96] = weight[64:96, 64:96].copy(), corner


@mutation()
def data_one_embedding_row(model: Any) -> None:
    model.get_input_embeddings().weight.data[int(PROMPT[0, 40])] *= 1.25


@mutation()
def data_one_element_of_an_embedding(model: Any) -> None:
    model.get_input_embeddings().weight.data[int(PROMPT[0, 40]), 17] += 0.5


@mutation(alters=False)
def data_embedding_of_a_token_that_nobody_says(model: Any) -> None:
    model.get_input_embeddings().weight.data[1] *= 1.25


@mutation()
def data_of_a_norm(model: Any) -> None:
    first(model).input_layernorm.weight.data.add_(0.5)


@mutation()
def data_one_element_of_a_norm(model: Any) -> None:
    first(model).input_layernorm.weight.data[200] += 0.5


@mutation()
def data_of_another_storage(model: Any) -> None:
    weight = output(model).weight
    weight.data = weight.data * 1.5


@mutation()
def data_set_to_another_tensor(model: Any) -> None:
    weight = output(model).weight
    with torch.no_grad():
        weight.set_(weight.data * 1.5)


@mutation()
def data_all_zero(model: Any) -> None:
    output(model).weight.data.zero_()


@mutation()
def data_not_a_number(model: Any) -> None:
    output(model).weight.data[0, 0] = float("nan")


@mutation()
def data_of_all_weights_and_back_but_one(model: Any) -> None:
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.mul_(2)
    changed = next(name for name in kept if name.endswith("layers.0.self_attn.o_proj.weight"))
    for name, tensor in model.state_dict().items():
        if name != changed:
            tensor.data.copy_(kept[name])


@mutation()
def bias_added(model: Any) -> None:
    layer = output(model)
    layer.bias = torch.nn.Parameter(torch.ones(layer.out_features, dtype=layer.weight.dtype))


@mutation()
def bias_changed(model: Any) -> Iterator[Any]:
    bias_added(model)
    yield
    output(model).bias.data.mul_(3)


@mutation()
def through_numpy(model: Any) -> None:
    _numpy(output(model).weight)[5] = 0


@mutation()
def through_numpy_taken_before(model: Any) -> Iterator[Any]:
    alias = _numpy(output(model).weight)
    yield
    alias[5] = 0


@mutation()
def through_a_view_taken_before(model: Any) -> Iterator[Any]:
    alias = output(model).weight.detach().view(-1)
    yield
    alias[1000:1100] = 1


@mutation()
def through_the_storage(model: Any) -> None:
    weight = output(model).weight
    other = (weight.detach() * 1.5).contiguous()
    weight.untyped_storage().copy_(other.untyped_storage())


@mutation()
def through_an_address(model: Any) -> None:
    address = output(model).weight.data_ptr()
    ctypes.memset(address + 4096, 0, 4096)


@mutation()
def through_dlpack(model: Any) -> None:
    torch.from_dlpack(output(model).weight.detach())[9] = 0


@mutation()
def by_another_process(model: Any) -> Iterator[Any]:
    """As torch's multiprocessing trains: weights lie in shared memory, somebody else writes."""
    model.share_memory()
    yield
    address = output(model).weight.data_ptr()
    child = os.fork()
    if child == 0:
        ctypes.memset(address + 4096, 0, 4096)
        os._exit(0)
    os.waitpid(child, 0)


@mutation()
def without_grad(model: Any) -> None:
    with torch.no_grad():
        output(model).weight.mul_(1.5)


@mutation()
def in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        output(model).weight.mul_(1.5)


@mutation()
def made_in_inference_mode(model: Any) -> Iterator[Any]:
    """Tensors without a version counter."""
    layer = output(model)
    with torch.inference_mode():
        layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
    yield
    with torch.inference_mode():
        layer.weight.mul_(1.5)


@mutation()
def foreach_multiplied(model: Any) -> None:
    with torch.no_grad():
        torch._foreach_mul_([output(model).weight, values(model).weight], 1.5)


@mutation()
def version_counter_preserved(model: Any) -> None:
    weight = output(model).weight
    with torch.autograd._unsafe_preserve_version_counter(weight), torch.no_grad():
        weight.mul_(1.5)


@mutation()
def initialised_anew(model: Any) -> None:
    torch.manual_seed(5)
    torch.nn.init.normal_(output(model).weight)


@mutation()
def reset_parameters(model: Any) -> None:
    torch.manual_seed(5)
    output(model).reset_parameters()


@mutation()
def loaded_from_a_state_dict(model: Any) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


@mutation()
def loaded_by_assignment(model: Any) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)


@mutation()
def loaded_from_a_file(model: Any) -> None:
    file = io.BytesIO()
    torch.save({"weight": output(model).weight.detach() * 1.5}, file)
    file.seek(0)
    output(model).load_state_dict(torch.load(file), strict=False)


@mutation()
def from_a_vector(model: Any) -> None:
    attention = first(model).self_attn
    vector = parameters_to_vector(attention.parameters())
    vector_to_parameters(vector * 1.5, attention.parameters())


@mutation()
def parameter_replaced(model: Any) -> None:
    layer = output(model)
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


@mutation()
def parameter_put_into_the_dict(model: Any) -> None:
    layer = output(model)
    layer._parameters["weight"] = torch.nn.Parameter(layer.weight.detach() * 1.5)


@mutation()
def parameters_of_two_layers_swapped(model: Any) -> None:
    one, two = output(model), model.get_decoder().layers[1].self_attn.o_proj
    one.weight, two.weight = two.weight, one.weight


@mutation()
def tensors_of_two_layers_swapped(model: Any) -> None:
    one, two = output(model), model.get_decoder().layers[1].self_attn.o_proj
    torch.utils.swap_tensors(one.weight, two.weight)


@mutation()
def weights_averaged(model: Any) -> None:
    average = torch.optim.swa_utils.AveragedModel(model)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    average.update_parameters(model)
    average.update_parameters(other)
    for mine, mean in zip(model.parameters(), average.module.parameters(), strict=True):
        mine.data.copy_(mean.data)


@mutation()
def another_weight_while_called(model: Any) -> Iterator[Any]:
    """As torch.func.functional_call swaps them."""
    yield
    name = "model.layers.0.self_attn.o_proj.weight"
    other = {name: output(model).weight.detach() * 1.5}
    with torch.nn.utils.stateless._reparametrize_module(model, other):
        yield


@mutation()
def half_precision(model: Any) -> None:
    model.half()


@mutation()
def rounded_to_eight_bits(model: Any) -> None:
    weight = output(model).weight
    scale = weight.detach().abs().max() / 127
    weight.data = (weight.detach() / scale).round() * scale


@mutation()
def rounded_to_float8(model: Any) -> None:
    weight = output(model).weight
    weight.data = weight.data.to(torch.float8_e4m3fn).to(weight.dtype)


@mutation("llama", "mixtral", dtypes=("float32",))
def quantized_dynamically(model: Any) -> None:
    layer = first(model).self_attn
    quantized = torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear})
    layer.o_proj, layer.v_proj = quantized.o_proj, quantized.v_proj


@mutation()
def a_buffer_that_is_kept(model: Any) -> Iterator[Any]:
    _shifted_by_a_buffer(model, persistent=True)
    yield
    output(model).shift.fill_(1)


@mutation()
def a_buffer_that_is_not_kept(model: Any) -> Iterator[Any]:
    _shifted_by_a_buffer(model, persistent=False)
    yield
    output(model).shift.data.fill_(1)


def _shifted_by_a_buffer(model: Any, persistent: bool) -> None:
    class Shifted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.shift

    layer = output(model)
    layer.__class__ = Shifted
    shift = torch.zeros(layer.out_features, dtype=layer.weight.dtype)
    layer.register_buffer("shift", shift, persistent=persistent)


@mutation("llama", "mixtral", "deepseek_v3")
def inverse_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq.data.mul_(0.5)


@mutation("gemma3")
def inverse_frequencies_of_one_layer_type(model: Any) -> None:
    model.model.rotary_emb.full_attention_inv_freq.data.mul_(0.5)


@mutation("llama", "mixtral", "deepseek_v3")
def inverse_frequencies_replaced(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq * 0.5


@mutation(alters=False)
def data_of_the_head(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)


@mutation(alters=False)
def data_of_the_last_norm(model: Any) -> None:
    model.get_decoder().norm.weight.data.mul_(-1)


@mutation()
def head_tied_and_changed(model: Any) -> Iterator[Any]:
    model.lm_head.weight = model.get_input_embeddings().weight
    yield
    model.lm_head.weight.data.mul_(1.5)


@mutation()
def tied_weights_untied(model: Any) -> Iterator[Any]:
    model.lm_head.weight = model.get_input_embeddings().weight
    yield
    embedding = model.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(embedding.weight.detach() * 1.5)


@mutation()
def a_weight_that_is_a_view_of_another(model: Any) -> Iterator[Any]:
    """Both projections lie in one tensor that no module holds."""
    flat = torch.cat(
        [output(model).weight.detach().view(-1), values(model).weight.detach().view(-1)]
    )
    at = 0
    for layer in (output(model), values(model)):
        size = layer.weight.numel()
        layer.weight = torch.nn.Parameter(flat[at : at + size].view_as(layer.weight))
        at += size
    yield
    flat[5000:6000] = 0


@mutation()
def a_weight_that_is_expanded(model: Any) -> Iterator[Any]:
    """One row for all rows."""
    layer = output(model)
    row = layer.weight.detach()[:1].clone()
    layer.weight = torch.nn.Parameter(row.expand_as(layer.weight), requires_grad=False)
    yield
    row.neg_()


@mutation()
def a_weight_that_is_transposed(model: Any) -> Iterator[Any]:
    layer = output(model)
    columns = layer.weight.detach().t().contiguous()
    layer.weight = torch.nn.Parameter(columns.t())
    yield
    columns[100:110] = 0


@mutation()
def a_weight_that_is_part_of_a_wider_one(model: Any) -> Iterator[Any]:
    layer = output(model)
    wide = torch.nn.functional.pad(layer.weight.detach(), (8, 8))
    layer.weight = torch.nn.Parameter(wide[:, 8:-8])
    yield
    wide[100:110, 20:30] = 0


class Weighed(torch.Tensor):
    """A tensor with a factor beside it, that its own linear applies."""

    factor = 1.0

    @classmethod
    def __torch_function__(
        cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        weight = next((a for a in args if isinstance(a, Weighed)), None)
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
        linear = function is torch.nn.functional.linear and weight is not None
        return out * weight.factor if linear else out


@mutation(refused=True)
def a_factor_on_a_tensor_of_ones_own_class(model: Any) -> Iterator[Any]:
    layer = output(model)
    weight = layer.weight.detach().as_subclass(Weighed)
    layer._parameters["weight"] = weight
    yield
    weight.factor = 2.0


@mutation(refused=True)
def a_factor_on_the_class_of_a_tensor(model: Any) -> Iterator[Any]:
    layer = output(model)
    layer._parameters["weight"] = layer.weight.detach().as_subclass(Weighed)
    yield
    Weighed.factor = 2.0
    yield
    Weighed.factor = 1.0


@mutation()
def a_scale_on_a_parameter(model: Any) -> Iterator[Any]:
    """An attribute of the tensor, as quantised layers keep their scales."""

    class Scaling(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.weight.scale

    layer = output(model)
    layer.__class__ = Scaling
    layer.weight.scale = torch.ones(1, dtype=layer.weight.dtype)
    yield
    layer.weight.scale.fill_(2)


@mutation("llama", dtypes=("float32",), refused=True)
def a_sparse_weight(model: Any) -> Iterator[Any]:
    class Sparse(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(weight.to_sparse_csr(), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight @ x.flatten(0, 1).t()).t().view(*x.shape[:-1], -1)

    first(model).self_attn.o_proj = Sparse(output(model).weight.detach()).eval()
    yield
    output(model).weight.values().mul_(1.5)
