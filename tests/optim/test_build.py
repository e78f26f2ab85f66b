"""From a recipe's section to an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bigtrain.config.schema import OptimizerSection
from bigtrain.errors import InputError
from bigtrain.optim import Adafactor, AdamW, Lamb, Muon, build, build_optimizer
from bigtrain.optim.build import weight_decay_groups
from bigtrain.optim.piecewise import Piecewise


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, dtype=dtype)
        self.linear = nn.Linear(4, 4, dtype=dtype)
        self.norm = nn.LayerNorm(4, dtype=dtype)


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


@pytest.mark.parametrize(("name", "kind"), [("adamw", AdamW), ("lamb", Lamb), ("muon", Muon)])
def test_the_recipe_names_the_optimizer_and_its_numbers(name: Any, kind: type) -> None:
    section = OptimizerSection(name=name, learning_rate=3e-4, betas=[0.8, 0.95], eps=1e-7, weight_decay=0.2)
    optimizer = build_optimizer(Small().parameters(), section)
    assert type(optimizer) is kind
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-7}
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.8, 0.95)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}


def test_adafactor_has_its_own_numbers() -> None:
    section = OptimizerSection(name="adafactor", learning_rate=3e-4, weight_decay=0.2)
    optimizer = build_optimizer(Small().parameters(), section)
    assert type(optimizer) is Adafactor
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}


@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit", "4bit"])
@pytest.mark.parametrize(("weights", "dtype"), [("fp32", torch.float32), ("split24", torch.bfloat16)])
def test_formats_are_passed_on(state: Any, weights: str, dtype: torch.dtype) -> None:
    section = OptimizerSection(learning_rate=1e-3, state=state)
    optimizer = build_optimizer(Small(dtype).parameters(), section, master_weights=weights)
    assert isinstance(optimizer, Piecewise)
    assert optimizer.state_format == state
    assert optimizer.weights.dtype == dtype


def test_muon_takes_the_matrices_that_it_is_given() -> None:
    model = Small()
    section = OptimizerSection(name="muon", learning_rate=1e-3, weight_decay=0.1)
    optimizer = build_optimizer(model.parameters(), section, matrices=[model.linear.weight, model.linear.bias])
    found = [(names_of(model, g["params"]), g["orthogonal"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [
        ({"linear.weight"}, True, 0.1),
        ({"embedding.weight"}, False, 0.1),
        ({"linear.bias", "norm.weight", "norm.bias"}, False, 0.0),
    ]


def test_muon_takes_all_of_two_dims_unless_told() -> None:
    model = Small()
    optimizer = build_optimizer(model.parameters(), OptimizerSection(name="muon", learning_rate=1e-3))
    assert names_of(model, optimizer.param_groups[0]["params"]) == {"embedding.weight", "linear.weight"}


def test_muon_without_a_matrix_is_refused() -> None:
    section = OptimizerSection(name="muon", learning_rate=1e-3)
    with pytest.raises(InputError, match="muon: the model has no matrix .* use adamw"):
        build_optimizer(Small().parameters(), section, matrices=[])


@pytest.mark.parametrize(
    ("section", "weights", "text"),
    [
        ({"name": "adafactor", "state": "8bit"}, "fp32", "8bit: adafactor keeps rows and columns only; use fp32"),
        ({"state": "auto"}, "fp32", "optimizer.state: 'auto' is none of fp32, bf16, 8bit, 4bit"),
        ({}, "auto", "amp.master_weights: 'auto' is none of fp32, split24, none"),
        ({}, "split24", "is float32; master weights split24 keep bfloat16"),
    ],
)
def test_what_does_not_exist_is_refused(section: dict[str, Any], weights: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        build_optimizer(Small().parameters(), OptimizerSection(learning_rate=1e-3, **section), master_weights=weights)


def test_apex_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvidia_apex_present", lambda: True)
    section = OptimizerSection(name="lamb", learning_rate=1e-3)
    assert type(build_optimizer(Small().parameters(), section)) is Lamb


@pytest.mark.parametrize("sharded", [False, True])
def test_apex_is_for_whole_parameters(sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_suits_apex", lambda parameters: True)
    monkeypatch.setattr(build, "fused_lamb", lambda groups, **options: "apex")
    found = build_optimizer(Small().parameters(), OptimizerSection(name="lamb", learning_rate=1e-3), sharded=sharded)
    assert (found == "apex") is not sharded


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
