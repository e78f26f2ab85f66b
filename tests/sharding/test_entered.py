"""A model whose calls go through an engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain.sharding.entered import OTHER_FORWARDS, Entered, enter


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.logits(x) if labels is None else self.inner(x).sum() + labels

    def logits(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)

    def evaluate(self, x: Tensor, *, doubled: bool = False) -> Tensor:
        return self.inner(x).mean() * (2 if doubled else 1)


class Engine(nn.Module):
    """Calls the model as libraries do, and notes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.module(*args, **kwargs)


@pytest.fixture
def entered() -> tuple[Any, Model, Engine]:
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    engine = Engine(model)
    enter(model, engine)
    return model, plain, engine


def test_calls_go_through_the_engine_once(entered: tuple[Any, Model, Engine]) -> None:
    model, plain, engine = entered
    x = torch.ones(3, 2)
    assert torch.equal(model(x, labels=x), plain(x, labels=x))
    assert torch.equal(model(x), plain(x))
    assert engine.calls == 2


def test_it_stays_the_model(entered: tuple[Any, Model, Engine]) -> None:
    model, plain, _ = entered
    assert isinstance(model, Model)
    assert isinstance(model, Entered)
    assert type(model).__name__ == "Model"
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == ["", "inner"]
    assert model.eval().inner.training is False


@pytest.mark.parametrize("name", OTHER_FORWARDS)
def test_other_forward_passes_go_through_it_too(name: str, entered: tuple[Any, Model, Engine]) -> None:
    model, plain, engine = entered
    x = torch.ones(3, 2)
    assert torch.equal(getattr(model, name)(x), getattr(plain, name)(x))
    assert engine.calls == 1
    assert "forward" not in vars(model)


def test_their_options_arrive(entered: tuple[Any, Model, Engine]) -> None:
    model, plain, _ = entered
    assert torch.equal(model.evaluate(torch.ones(1, 2), doubled=True), plain.evaluate(torch.ones(1, 2), doubled=True))


def test_a_forward_of_its_own_comes_back(entered: tuple[Any, Model, Engine]) -> None:
    model, plain, _ = entered
    own = model.forward
    model.forward = own
    x = torch.ones(1, 2)
    assert torch.equal(model.evaluate(x), plain.evaluate(x))
    assert vars(model)["forward"] is own


def test_an_error_leaves_it_as_it_was(entered: tuple[Any, Model, Engine]) -> None:
    model, plain, engine = entered
    for call in (model, model.evaluate):
        with pytest.raises(RuntimeError):
            call(torch.ones(1, 3))
    assert "forward" not in vars(model)
    x = torch.ones(1, 2)
    assert torch.equal(model(x), plain(x))
    assert engine.calls == 3


def test_a_model_without_other_forward_passes_is_entered_as_well() -> None:
    model = nn.Linear(2, 2)
    engine = Engine(model)
    enter(model, engine)
    model(torch.ones(1, 2))
    assert engine.calls == 1
