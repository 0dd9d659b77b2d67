"""Modules exchanged, shared, cut and wrapped, and the settings that their forward reads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.utils import parametrizations, parametrize, prune

from tests.connectors.transformers.mutations import first, mutation, output, values


def _renumber(model: Any) -> None:
    layers = model.get_decoder().layers
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(layers)


@mutation("llama", "mixtral")
def layers_reversed(model: Any) -> None:
    decoder = model.get_decoder()
    decoder.layers = torch.nn.ModuleList(reversed(list(decoder.layers)))
    _renumber(model)


@mutation("llama", "mixtral")
def layers_swapped_in_their_list(model: Any) -> None:
    layers = model.get_decoder().layers
    layers[0], layers[1] = layers[1], layers[0]
    _renumber(model)


@mutation("llama", "mixtral")
def first_layer_removed(model: Any) -> None:
    del model.get_decoder().layers[0]
    _renumber(model)


@mutation("llama", "mixtral")
def last_layer_removed(model: Any) -> None:
    del model.get_decoder().layers[-1]
    _renumber(model)


@mutation("llama", "mixtral")
def last_layer_not_counted(model: Any) -> None:
    model.config.num_hidden_layers -= 1


@mutation("llama", "mixtral")
def layer_added(model: Any) -> None:
    layers = model.get_decoder().layers
    layers.append(copy.deepcopy(layers[0]))
    _renumber(model)


@mutation("llama", "mixtral")
def mlp_shared_by_two_layers(model: Any) -> None:
    layers = model.get_decoder().layers
    layers[0].mlp = layers[1].mlp


@mutation("llama", "mixtral")
def shared_mlp_copied_and_changed(model: Any) -> Iterator[Any]:
    layers = model.get_decoder().layers
    layers[0].mlp = layers[1].mlp
    yield
    layers[0].mlp = copy.deepcopy(layers[1].mlp)
    for parameter in layers[0].mlp.parameters():
        parameter.data.mul_(1.5)


@mutation()
def norms_of_two_layers_swapped(model: Any) -> Iterator[Any]:
    layers = model.get_decoder().layers
    layers[1].input_layernorm.weight.data.mul_(1.5)
    yield
    one, two = layers[0].input_layernorm, layers[1].input_layernorm
    layers[0].input_layernorm, layers[1].input_layernorm = two, one


@mutation()
def norm_replaced_by_nothing(model: Any) -> None:
    first(model).post_attention_layernorm = torch.nn.Identity()


@mutation()
def norm_of_another_kind(model: Any) -> None:
    old = first(model).post_attention_layernorm.weight
    first(model).post_attention_layernorm = torch.nn.RMSNorm(old.shape[0], eps=0.5, dtype=old.dtype)


@mutation()
def mlp_replaced_by_nothing(model: Any) -> None:
    class Zero(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    first(model).mlp = Zero()


@mutation()
def linear_replaced(model: Any) -> None:
    old = output(model)
    new = torch.nn.Linear(old.in_features, old.out_features, bias=False, dtype=old.weight.dtype)
    new.weight.data.copy_(old.weight.data * 1.5)
    first(model).self_attn.o_proj = new


@mutation()
def linear_put_into_the_dict(model: Any) -> None:
    new = copy.deepcopy(output(model))
    new.weight.data.mul_(1.5)
    first(model).self_attn._modules["o_proj"] = new


@mutation()
def linear_wrapped_in_a_sequence(model: Any) -> None:
    first(model).self_attn.o_proj = torch.nn.Sequential(output(model), torch.nn.Tanh())


@mutation()
def sequence_extended(model: Any) -> Iterator[Any]:
    sequence = torch.nn.Sequential(output(model))
    first(model).self_attn.o_proj = sequence
    yield
    sequence.append(torch.nn.Tanh())


@mutation()
def sequence_in_another_order(model: Any) -> Iterator[Any]:
    sequence = torch.nn.Sequential(output(model), torch.nn.Tanh(), torch.nn.Softsign())
    first(model).self_attn.o_proj = sequence
    yield
    sequence[1], sequence[2] = sequence[2], sequence[1]
    sequence.insert(1, torch.nn.Hardtanh(-0.1, 0.1))


@mutation("llama", "gemma3")
def activation_replaced(model: Any) -> None:
    first(model).mlp.act_fn = torch.nn.ReLU()


@mutation("mixtral")
def activation_of_the_experts_replaced(model: Any) -> None:
    first(model).mlp.experts.act_fn = torch.nn.ReLU()


@mutation()
def embedding_replaced(model: Any) -> None:
    embedding = copy.deepcopy(model.get_input_embeddings())
    embedding.weight.data.mul_(1.5)
    model.set_input_embeddings(embedding)


@mutation()
def decoder_replaced(model: Any) -> None:
    decoder = copy.deepcopy(model.model)
    decoder.layers[0].self_attn.o_proj.weight.data.mul_(1.5)
    model.model = decoder


@mutation()
def everything_replaced(model: Any) -> None:
    """The state of another model in the object that is attached."""
    other = copy.deepcopy(model)
    other.model.layers[0].self_attn.o_proj.weight.data.mul_(1.5)
    model._modules = other._modules


# Parametrizations, pruning, normalised weights


class Doubled(torch.nn.Module):
    """A parametrization with a factor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@mutation()
def parametrized(model: Any) -> None:
    parametrize.register_parametrization(output(model), "weight", Doubled())


@mutation()
def attribute_of_a_parametrization(model: Any) -> Iterator[Any]:
    parametrize.register_parametrization(output(model), "weight", Doubled())
    model.eval()
    yield
    output(model).parametrizations.weight[0].factor = 3.0


@mutation()
def parametrization_removed(model: Any) -> Iterator[Any]:
    parametrize.register_parametrization(output(model), "weight", Doubled(), unsafe=True)
    model.eval()
    yield
    parametrize.remove_parametrizations(output(model), "weight", leave_parametrized=False)


@mutation()
def weight_under_a_parametrization(model: Any) -> Iterator[Any]:
    parametrize.register_parametrization(output(model), "weight", Doubled())
    model.eval()
    yield
    output(model).parametrizations.weight.original.data.mul_(1.5)


@mutation(dtypes=("float32",))
def weight_norm(model: Any) -> Iterator[Any]:
    parametrizations.weight_norm(output(model))
    model.eval()
    yield
    output(model).parametrizations.weight.original0.data.mul_(1.5)


@mutation(dtypes=("float32",))
def spectral_norm(model: Any) -> None:
    torch.manual_seed(4)
    parametrizations.spectral_norm(output(model))


@mutation(dtypes=("float32",))
def spectral_norm_by_a_hook(model: Any) -> None:
    torch.manual_seed(4)
    torch.nn.utils.spectral_norm(output(model))


@mutation("llama", dtypes=("float32",))
def orthogonal(model: Any) -> None:
    torch.manual_seed(4)
    parametrizations.orthogonal(output(model))


@mutation()
def pruned(model: Any) -> None:
    prune.l1_unstructured(output(model), "weight", amount=0.3)


@mutation()
def pruned_by_rows(model: Any) -> None:
    prune.ln_structured(output(model), "weight", amount=0.3, n=2, dim=0)


@mutation()
def pruned_for_good(model: Any) -> None:
    prune.l1_unstructured(output(model), "weight", amount=0.3)
    prune.remove(output(model), "weight")


@mutation(refused=True)
def mask_of_pruning_changed(model: Any) -> Iterator[Any]:
    prune.l1_unstructured(output(model), "weight", amount=0.3)
    yield
    output(model).weight_mask.data[::2] = 0


# Settings


@mutation()
def scale_of_attention(model: Any) -> None:
    first(model).self_attn.scaling *= 4


@mutation()
def epsilon_of_a_norm(model: Any) -> None:
    norm = first(model).input_layernorm
    setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 10.0)


@mutation("llama", "mixtral", "deepseek_v3")
def scale_of_positions(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 1.5


@mutation("llama", "mixtral", "deepseek_v3")
def rotary_of_another_base(model: Any) -> None:
    settings = copy.deepcopy(model.config)
    settings.rope_parameters["rope_theta"] = 50.0
    model.model.rotary_emb = type(model.model.rotary_emb)(config=settings).eval()


@mutation("llama", "mixtral", "deepseek_v3")
def rotary_scaled_linearly(model: Any) -> None:
    model.config.rope_parameters = {
        "rope_type": "linear",
        "factor": 4.0,
        "rope_theta": 10000.0,
    }
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).eval()


@mutation()
def attention_of_both_directions(model: Any) -> None:
    for layer in model.get_decoder().layers:
        layer.self_attn.is_causal = False


@mutation()
def attention_implementation(model: Any) -> None:
    model.set_attn_implementation("eager")
    first(model).self_attn.scaling *= 1.01  # more than rounding


@mutation("llama", "mixtral")
def groups_of_heads(model: Any) -> None:
    """The width of a head, at its layer alone."""
    attention = first(model).self_attn
    attention.head_dim, attention.num_key_value_groups = 64, 2
    attention.scaling = 1.0


@mutation("llama")
def dropout_in_training(model: Any) -> None:
    model.config.attention_dropout = 0.3
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.3
    model.train()


@mutation("llama")
def dropout_in_training_of_one_module(model: Any) -> None:
    first(model).self_attn.attention_dropout = 0.3
    first(model).self_attn.train()


@mutation()
def dropout_that_is_a_module(model: Any) -> Iterator[Any]:
    first(model).self_attn.o_proj = torch.nn.Sequential(output(model), torch.nn.Dropout(0.3))
    model.eval()
    yield
    output(model)[1].train()


@mutation()
def batch_norm_in_training(model: Any) -> Iterator[Any]:
    """Its statistics change with each call."""

    class Norm(torch.nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(0, 1)).view_as(x)

    norm = Norm(output(model).out_features, dtype=output(model).weight.dtype)
    first(model).self_attn.o_proj = torch.nn.Sequential(output(model), norm)
    model.eval()
    yield
    norm.running_mean.fill_(0.5)


@mutation("gemma3")
def window_of_the_config(model: Any) -> None:
    model.config.sliding_window = 8


@mutation("gemma3")
def window_of_a_layer_and_the_config(model: Any) -> None:
    model.config.sliding_window = 8
    for layer in model.get_decoder().layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 8


@mutation("gemma3")
def window_for_every_layer(model: Any) -> None:
    model.config.layer_types = ["sliding_attention"] * 3


@mutation("mixtral")
def window_where_there_was_none(model: Any) -> None:
    model.config.sliding_window = 8


@mutation("gemma3")
def scale_of_embeddings(model: Any) -> None:
    model.get_input_embeddings().embed_scale.data.mul_(1.5)


@mutation("gemma3")
def norm_of_keys(model: Any) -> None:
    first(model).self_attn.k_norm.weight.data.add_(0.5)


@mutation("gemma3")
def norm_of_queries(model: Any) -> None:
    first(model).self_attn.q_norm.weight.data.add_(0.5)


@mutation("mixtral", "deepseek_v3")
def router_weights(model: Any) -> None:
    model.get_decoder().layers[-2].mlp.gate.weight.data.neg_()


@mutation("mixtral", "deepseek_v3")
def router_picks_more(model: Any) -> None:
    model.get_decoder().layers[-2].mlp.gate.top_k = 3


@mutation("deepseek_v3")
def router_bias(model: Any) -> None:
    model.get_decoder().layers[1].mlp.gate.e_score_correction_bias.data[3] += 10


@mutation("deepseek_v3")
def router_factor(model: Any) -> None:
    model.get_decoder().layers[1].mlp.gate.routed_scaling_factor = 0.5


@mutation("deepseek_v3")
def router_groups(model: Any) -> None:
    model.get_decoder().layers[1].mlp.gate.topk_group = 2


@mutation("deepseek_v3")
def router_does_not_normalise(model: Any) -> None:
    model.get_decoder().layers[1].mlp.gate.norm_topk_prob = False


@mutation("mixtral", "deepseek_v3", alters=None)
def one_expert_that_few_tokens_meet(model: Any) -> None:
    model.get_decoder().layers[-2].mlp.experts.down_proj.data[5].mul_(1.5)


@mutation("mixtral", "deepseek_v3")
def all_experts_up(model: Any) -> None:
    model.get_decoder().layers[-2].mlp.experts.gate_up_proj.data.mul_(1.5)


@mutation("mixtral", "deepseek_v3")
def experts_permuted(model: Any) -> None:
    experts = model.get_decoder().layers[-2].mlp.experts.down_proj.data
    experts.copy_(experts.roll(1, 0))


@mutation("mixtral", "deepseek_v3")
def two_elements_within_an_expert(model: Any) -> None:
    experts = model.get_decoder().layers[-2].mlp.experts.down_proj.data
    experts[:, 9, 20:22] += 0.5


@mutation("deepseek_v3")
def shared_expert(model: Any) -> None:
    model.get_decoder().layers[1].mlp.shared_experts.down_proj.weight.data.mul_(1.5)


@mutation("deepseek_v3")
def latent_down_projection(model: Any) -> None:
    first(model).self_attn.kv_a_proj_with_mqa.weight.data[5].mul_(1.5)


@mutation("deepseek_v3")
def latent_up_projection(model: Any) -> None:
    first(model).self_attn.kv_b_proj.weight.data[5].mul_(1.5)


@mutation("deepseek_v3")
def latent_norm(model: Any) -> None:
    first(model).self_attn.kv_a_layernorm.weight.data[5] += 0.5


@mutation("deepseek_v3")
def latent_query_projections(model: Any) -> None:
    first(model).self_attn.q_a_proj.weight.data[5].mul_(1.5)
    first(model).self_attn.q_b_proj.weight.data[5].mul_(1.5)


@mutation("deepseek_v3")
def latent_query_norm(model: Any) -> None:
    first(model).self_attn.q_a_layernorm.weight.data[5] += 0.5


@mutation("deepseek_v3")
def rotation_not_interleaved(model: Any) -> None:
    model.config.rope_interleave = False


@mutation(alters=False)
def a_setting_that_nobody_reads(model: Any) -> None:
    model.config.initializer_range = 0.5


@mutation(alters=False)
def gradients_not_required(model: Any) -> None:
    values(model).weight.requires_grad_(False)
