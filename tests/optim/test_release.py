"""Gradient release: the same numbers as without, one gradient at a time, and no accumulation by accident."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain.errors import InputError
from bigtrain.optim import Adafactor, AdamW, Lamb, Muon
from bigtrain.optim.release import gradient_norm, norm_of, release


class Tied(nn.Module):
    """A model whose first and last operation share a matrix, with others between them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(80, 64, dtype=dtype)
        self.layers = nn.Sequential(nn.Linear(64, 64, dtype=dtype), nn.GELU(), nn.Linear(64, 64, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(64, dtype=dtype), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(tokens)) * self.frozen
        return (hidden @ self.embedding.weight.T).float().logsumexp(-1).mean() + hidden.float().square().mean()


def tokens(step: int) -> Tensor:
    return torch.randint(0, 80, (7,), generator=torch.Generator().manual_seed(step))


def train(model: Tied, optimizer: torch.optim.Optimizer, *, released: bool, steps: int = 3) -> list[Tensor]:
    """Take some steps; return the norms of the gradients."""
    handle = release(model.parameters(), optimizer) if released else None
    norms = []
    for step in range(steps):
        model(tokens(step)).backward()
        if handle is None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
            optimizer.step()
            optimizer.zero_grad()
        else:
            assert all(p.grad is None for p in model.parameters())
            norms.append(handle.take_norm())
    return norms


@pytest.mark.parametrize(
    ("state", "weights"), [("fp32", "fp32"), ("8bit", "split24"), ("4bit", "none"), ("bf16", "split24")]
)
@pytest.mark.parametrize("kind", [AdamW, Lamb])
def test_bitwise_as_without(kind: type, state: str, weights: str) -> None:
    models, norms, states = [], [], []
    for released in (False, True):
        model = Tied(torch.float32 if weights == "fp32" else torch.bfloat16)
        optimizer = kind(model.parameters(), 0.01, state=state, master_weights=weights)
        norms.append(train(model, optimizer, released=released))
        models.append(model)
        states.append([value for p in model.parameters() for value in optimizer.state.get(p, {}).values()])
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    tolerance = 1e-6 if weights == "fp32" else 4e-3
    torch.testing.assert_close(torch.stack(norms[0]).float(), torch.stack(norms[1]), rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_any_optimizer_of_torch(kind: type[torch.optim.Optimizer]) -> None:
    models = []
    for released in (False, True):
        model = Tied()
        train(model, kind([p for p in model.parameters() if p.requires_grad], lr=0.01), released=released)
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_shared_parameter_is_updated_once_with_all_of_its_gradient() -> None:
    model, plain = Tied(), Tied()
    optimizer = AdamW(model.parameters(), 0.01)
    handle = release(model.parameters(), optimizer)
    model(tokens(0)).backward()
    assert optimizer.state[model.embedding.weight]["step"] == 1
    plain(tokens(0)).backward()
    assert plain.embedding.weight.grad is not None
    expected = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]))
    torch.testing.assert_close(handle.take_norm(), expected)


def test_only_one_gradient_lives_at_a_time() -> None:
    layers = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(6)])
    optimizer, alive = AdamW(layers.parameters(), 0.01), []
    update = optimizer.update

    def watched(parameter: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in layers.parameters()))
        update(parameter)

    optimizer.update = watched  # type: ignore[method-assign]
    release(layers.parameters(), optimizer)
    layers(torch.randn(2, 8)).sum().backward()
    assert alive == [1] * 6


def test_a_second_backward_is_refused() -> None:
    model = Tied()
    handle = release(model.parameters(), AdamW(model.parameters(), 0.01))
    model(tokens(0)).backward()
    with pytest.raises(InputError, match="second gradient in one step; .* set optimizer.gradient_release=false"):
        model(tokens(1)).backward()
    handle.take_norm()


def test_after_taking_the_norm_the_next_step_may_come() -> None:
    model = Tied()
    handle = release(model.parameters(), AdamW(model.parameters(), 0.01))
    assert handle.take_norm() == 0
    model(tokens(0)).backward()
    assert handle.take_norm() > 0
    assert handle.take_norm() == 0
    model(tokens(1)).backward()


@pytest.mark.parametrize("kind", [AdamW, Lamb, Adafactor])
def test_a_gradient_that_is_not_finite_is_seen_and_not_applied(kind: type) -> None:
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = kind([good, bad], 0.1)
    handle = release([good, bad], optimizer)
    (good.sum() + (bad * float("inf")).sum()).backward()
    assert not bool(torch.isfinite(handle.take_norm()))
    assert torch.equal(bad, torch.ones(3))
    assert bool((good < 1).all())
    assert optimizer.found_inf is None


def test_a_step_known_to_be_bad_changes_nothing() -> None:
    model = Tied()
    optimizer = AdamW(model.parameters(), 0.01)
    before = [p.detach().clone() for p in model.parameters()]
    handle = release(model.parameters(), optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    model(tokens(0)).backward()
    assert bool(torch.isfinite(handle.take_norm()))
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_removed_hooks_leave_gradients_alone() -> None:
    model = Tied()
    handle = release(model.parameters(), AdamW(model.parameters(), 0.01))
    handle.remove()
    model(tokens(0)).backward()
    assert model.embedding.weight.grad is not None
    assert handle.take_norm() == 0


@pytest.mark.parametrize("kind", [AdamW, torch.optim.SGD])
def test_gradients_go_to_what_the_optimizer_has_instead(kind: Any) -> None:
    model, plain = Tied(), Tied()
    held = [nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()]
    handle = release(model.parameters(), kind(held, 0.01), held)
    model(tokens(0)).backward()
    assert all(p.grad is None for p in (*model.parameters(), *held))
    norms = train(plain, kind(plain.parameters(), 0.01), released=False, steps=1)
    torch.testing.assert_close(handle.take_norm(), norms[0])
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))


def test_what_is_held_must_be_the_optimizers() -> None:
    model = Tied()
    held = [nn.Parameter(p.detach()) for p in model.parameters()]
    with pytest.raises(InputError, match="is not among those of AdamW"):
        release(model.parameters(), AdamW(model.parameters(), 0.01), held)


@pytest.mark.parametrize("kind", [Lamb, Adafactor, Muon])
def test_optimizers_that_would_ask_other_ranks_are_refused(kind: Any) -> None:
    own = nn.Parameter(torch.ones(3, 2))
    optimizer = kind([own], 0.1)
    release([own], optimizer).remove()
    optimizer.exchange = object()
    with pytest.raises(InputError, match=r"optimizer.gradient_release: \w+ needs .* or sharding.zero_stage=0"):
        release([own], optimizer)


def test_rows_alone_are_enough_for_adamw() -> None:
    own = nn.Parameter(torch.ones(3, 2))
    optimizer: Any = AdamW([own], 0.1)
    optimizer.exchange = object()
    handle = release([own], optimizer)
    own.sum().backward()
    torch.testing.assert_close(handle.take_norm(), torch.tensor(6.0).sqrt())
    assert bool((own < 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_have_no_norm(dtype: torch.dtype) -> None:
    norm = gradient_norm(torch.empty(0, 4, dtype=dtype))
    assert norm.dtype == torch.float32
    assert norm == 0


def test_the_norm_of_a_bf16_gradient_is_taken_in_fp32() -> None:
    gradient = torch.randn(3000, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = gradient_norm(gradient)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, torch.linalg.vector_norm(gradient.float()))


def test_what_several_ranks_have_counts_once() -> None:
    norms = [torch.tensor(3.0), torch.tensor(4.0)]
    assert norm_of(norms) == 5
    assert norm_of(norms, [1, 1]) == 5
    torch.testing.assert_close(2 * norm_of(norms, [1, 4]).square() + 2 * 4, torch.tensor(2 * (9 + 4.0) + 8))
    layer = nn.Linear(2, 2)
    handle = release(layer.parameters(), AdamW(layer.parameters()))
    layer(torch.ones(1, 2)).sum().backward()
    torch.testing.assert_close(handle.take_norm([1, 2]), torch.tensor(5.0).sqrt())
