"""Every optimizer of torch takes a step: plain, over lists of tensors, fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.connectors.transformers.mutations import add, first, mutation, output, values

KINDS = {
    "SGD": {"lr": 0.05}, "Adam": {"lr": 0.01}, "AdamW": {"lr": 0.01}, "Adagrad": {"lr": 0.01},
    "Adadelta": {"lr": 10.0}, "Adamax": {"lr": 0.01}, "NAdam": {"lr": 0.01}, "RAdam": {"lr": 0.05},
    "RMSprop": {"lr": 0.01}, "Rprop": {"lr": 0.01}, "ASGD": {"lr": 0.05},
}  # fmt: skip
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")


def _gradients(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return parameters


def _step(kind: str, **how: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        parameters = _gradients(list(first(model).parameters()))
        optimizer = getattr(torch.optim, kind)(parameters, **KINDS[kind], **how)
        optimizer.step()
        optimizer.zero_grad()

    return change


for _kind in KINDS:
    add(f"{_kind}_step", _step(_kind, foreach=False))
    add(f"{_kind}_foreach_step", _step(_kind, foreach=True), soak=_kind != "AdamW")
for _kind in FUSED:
    add(f"{_kind}_fused_step", _step(_kind, fused=True))


@mutation(dtypes=("float32",))
def AdamW_fused_step_of_a_small_rate(model: Any) -> None:
    parameters = _gradients(list(first(model).parameters()))
    torch.optim.AdamW(parameters, lr=1e-7, fused=True, weight_decay=0).step()


@mutation()
def Adafactor_step(model: Any) -> None:
    torch.optim.Adafactor(_gradients(list(first(model).parameters())), lr=0.05).step()


@mutation()
def Muon_step(model: Any) -> None:
    matrices = [p for p in first(model).parameters() if p.dim() == 2]
    torch.optim.Muon(_gradients(matrices), lr=0.05).step()


@mutation()
def LBFGS_step(model: Any) -> None:
    parameters = [output(model).weight, values(model).weight]
    optimizer = torch.optim.LBFGS(parameters, lr=0.1, max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(p.float().abs().mean() for p in parameters)
        loss.backward()
        return loss.detach()

    optimizer.step(closure)


@mutation()
def SparseAdam_step(model: Any) -> None:
    weight = model.get_input_embeddings().weight
    rows = torch.ones(weight.shape[0], weight.shape[1], dtype=weight.dtype)
    weight.grad = rows.to_sparse(1)
    torch.optim.SparseAdam([weight], lr=0.05).step()


@mutation()
def one_step_of_training(model: Any) -> None:
    """A loss, backward and the Trainer's default optimizer."""
    ids = torch.arange(3, 35)[None]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@mutation()
def step_with_a_closed_over_gradient_scaler(model: Any) -> None:
    parameters = _gradients(list(first(model).parameters()))
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.param_groups[0]["lr"] = 1.0
    scaler.step(optimizer)
    scaler.update()
