"""From a recipe's section to an optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bigtrain.config.schema import OptimizerSection
from bigtrain.optim import Lamb, build_optimizer
from bigtrain.optim.build import weight_decay_groups


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    return {name for name, p in model.named_parameters() if any(p is q for q in parameters)}


def test_biases_and_norms_get_no_weight_decay() -> None:
    model = Small()
    decayed, plain = weight_decay_groups(model.parameters(), 0.1)
    assert names_of(model, decayed["params"]) == {"embedding.weight", "linear.weight"}
    assert decayed["weight_decay"] == 0.1
    assert names_of(model, plain["params"]) == {"linear.bias", "norm.weight", "norm.bias"}
    assert plain["weight_decay"] == 0.0


def test_frozen_parameters_are_left_out() -> None:
    model = Small()
    model.embedding.weight.requires_grad_(False)
    decayed, _ = weight_decay_groups(model.parameters(), 0.1)
    assert names_of(model, decayed["params"]) == {"linear.weight"}


def test_no_empty_group() -> None:
    assert len(weight_decay_groups([nn.Parameter(torch.ones(3))], 0.1)) == 1


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("lamb", Lamb)])
def test_the_recipe_names_the_optimizer_and_its_numbers(name: str, kind: type) -> None:
    section = OptimizerSection(name=name, learning_rate=3e-4, betas=[0.8, 0.95], eps=1e-7, weight_decay=0.2)
    optimizer = build_optimizer(Small().parameters(), section)
    assert type(optimizer) is kind
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-7}
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.8, 0.95)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}


def test_fused_adamw_equals_the_plain_one_on_the_cpu() -> None:
    torch.manual_seed(0)
    section = OptimizerSection(learning_rate=1e-2)
    models = [Small(), Small()]
    models[1].load_state_dict(models[0].state_dict())
    groups = weight_decay_groups(models[1].parameters(), section.weight_decay)
    pair = [
        build_optimizer(models[0].parameters(), section),
        torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=section.eps, foreach=False),
    ]
    for _ in range(5):
        gradients = [torch.randn_like(p) for p in models[0].parameters()]
        for model, optimizer in zip(models, pair, strict=True):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
