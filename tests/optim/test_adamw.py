"""AdamW: torch's own numbers in fp32, close to them in fewer bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bigtrain.optim import AdamW
from bigtrain.optim.cost import MASTER_WEIGHTS, STATES

SHAPES = [(80, 64), (33,), (3, 5, 7)]


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, noise: float = 1.0) -> None:
    """Take steps with gradients that have a mean, a scale of their own for each element, and noise."""
    generator = torch.Generator().manual_seed(5)
    means = [torch.randn(p.shape, generator=generator) * torch.rand(p.shape, generator=generator) for p in parameters]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.002 * (1 - step / steps)
        for parameter, mean in zip(parameters, means, strict=True):
            gradient = mean * (1 + noise * torch.randn(mean.shape, generator=generator))
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def starts(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype)) for shape in SHAPES]


def groups(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]


def joined(optimizer: AdamW, parameter: nn.Parameter) -> Tensor:
    """Return the weights that a parameter and its remainder hold together."""
    weights = parameter.detach().float()
    if "remainder" not in optimizer.state[parameter]:
        return weights
    return (weights.view(torch.int32) + optimizer.state[parameter]["remainder"].int() * 256).view(torch.float32)


def test_fp32_is_bitwise_torchs() -> None:
    ours, theirs = starts(), starts()
    one, other = AdamW(groups(ours), eps=1e-6), torch.optim.AdamW(groups(theirs), eps=1e-6, fused=True)
    run(one, ours, 50)
    run(other, theirs, 50)
    for parameter, expected in zip(ours, theirs, strict=True):
        assert torch.equal(parameter, expected)
        assert one.state[parameter].keys() == other.state[expected].keys()
        for key, value in other.state[expected].items():
            assert torch.equal(one.state[parameter][key], value)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("weights", MASTER_WEIGHTS)
def test_fifty_steps_are_close_to_torchs(state: str, weights: str) -> None:
    """Compare how far weights went, relative to how far they went in fp32."""
    ours = starts(torch.float32 if weights == "fp32" else torch.bfloat16)
    theirs, begin = starts(), starts()
    one = AdamW(groups(ours), eps=1e-6, state=state, master_weights=weights)
    run(one, ours, 50)
    run(torch.optim.AdamW(groups(theirs), eps=1e-6, fused=True), theirs, 50)
    moved = {"fp32": 0.01, "bf16": 0.02, "8bit": 0.06, "4bit": 0.35}[state]
    bound = math.hypot(moved, 0.25 if weights == "none" else 0.015)
    for parameter, expected, start in zip(ours, theirs, begin, strict=True):
        far = torch.linalg.vector_norm(joined(one, parameter) - expected.detach())
        assert float(far / torch.linalg.vector_norm((expected - start).detach())) < bound


def test_states_are_kept_as_said() -> None:
    parameter = nn.Parameter(torch.randn(64, 65, dtype=torch.bfloat16))
    optimizer = AdamW([parameter], state="8bit", master_weights="split24")
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    kinds = {key: (value.dtype, tuple(value.shape)) for key, value in optimizer.state[parameter].items()}
    assert kinds == {
        "step": (torch.float32, ()),
        "exp_avg": (torch.int8, (64, 65)),
        "exp_avg_scale": (torch.float32, (17,)),
        "exp_avg_sq": (torch.uint8, (64, 65)),
        "exp_avg_sq_scale": (torch.float32, (17,)),
        "remainder": (torch.int8, (64, 65)),
    }


def test_a_learning_rate_of_zero_moves_nothing() -> None:
    parameter = nn.Parameter(torch.randn(70, 64, dtype=torch.bfloat16))
    before = parameter.detach().clone()
    optimizer = AdamW([parameter], lr=0.0, state="8bit", master_weights="split24")
    for _ in range(5):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("state", "weights", "worse"), [("8bit", "split24", 1.02), ("4bit", "split24", 1.1), ("bf16", "none", 1.25)]
)
def test_a_small_network_learns_as_in_fp32(state: str, weights: str, worse: float) -> None:
    exact, lean = (final_loss(*choice) for choice in (("fp32", "fp32"), (state, weights)))
    assert lean < worse * exact


def final_loss(state: str, weights: str) -> float:
    """Return the mean loss of the last steps of a regression on a random network's outputs."""
    generator = torch.Generator().manual_seed(3)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    teacher = [torch.randn(32, 96, generator=generator) / 6, torch.randn(96, 8, generator=generator) / 10]
    student = [nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in ((32, 160), (160, 32))]
    optimizer = AdamW(student, lr=0.01, weight_decay=0.0, state=state, master_weights=weights)
    losses = []
    for step in range(150):
        inputs = torch.randn(64, 32, generator=generator)
        wanted = torch.relu(inputs @ teacher[0]) @ teacher[1]
        given = (torch.relu(inputs @ student[0].float()) @ student[1].float())[:, :8]
        loss = (given - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 150)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@pytest.mark.parametrize("there", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("weights", MASTER_WEIGHTS)
def test_a_device_gives_the_cpus_numbers(state: str, weights: str, there: str) -> None:
    results = []
    for device in ("cpu", there):
        dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        parameters = [nn.Parameter(p.detach().to(device)) for p in starts(dtype)]
        optimizer = AdamW(groups(parameters), state=state, master_weights=weights)
        optimizer.found_inf = torch.zeros((), device=device)
        generator = torch.Generator().manual_seed(2)
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
            optimizer.step()
        results.append(torch.cat([p.detach().float().cpu().view(-1) for p in parameters]))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-3)
