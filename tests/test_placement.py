"""Where a model stands: created from the meta device, initialised by the seed alone, its repeated blocks found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigtrain.errors import InputError
from bigtrain.placement import find_blocks, place

CPU = torch.device("cpu")


class Plain(nn.Module):
    """A stack of layers whose head is the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = self.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_tied_weights_stay_tied_from_the_meta_device() -> None:
    with torch.device("meta"):
        model = Plain()
    place(model, CPU, seed=0)
    assert model.head.weight is model.layers[0].weight
    assert not model.head.weight.is_meta


def test_initial_weights_depend_on_the_seed_alone() -> None:
    models = []
    for seed in (1, 1, 2):
        with torch.device("meta"):
            models.append(Plain())
        place(models[-1], CPU, seed=seed)
    assert torch.equal(models[0].head.weight, models[1].head.weight)
    assert not torch.equal(models[0].head.weight, models[2].head.weight)


def test_a_module_that_cannot_initialise_itself_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.scale = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        model = Bare()
    with pytest.raises(InputError, match=r"inner: Module is on the meta device and has no reset_parameters"):
        place(model, CPU, seed=0)


def test_blocks_are_found() -> None:
    model = Plain()
    assert find_blocks(model) == list(model.layers)
    assert find_blocks(model, nn.Linear) == list(model.layers)
    with pytest.raises(InputError, match="no ModuleList of blocks"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(InputError, match="Plain: has no module of class Conv1d; name the class of its blocks"):
        find_blocks(model, nn.Conv1d)


def test_blocks_may_be_given_one_by_one() -> None:
    model = Plain()
    assert find_blocks(model, [model.layers[1]]) == [model.layers[1]]
    with pytest.raises(InputError, match="Plain: a Linear among the blocks is not part of it"):
        find_blocks(model, [nn.Linear(4, 4)])
    with pytest.raises(InputError, match="Plain: has no ModuleList of blocks"):
        find_blocks(model, [])


def test_buffers_that_nobody_fills_are_refused_by_name() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("pos", torch.arange(6))

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), Positions())
    with pytest.raises(InputError, match="1: Positions is on the meta device"):
        place(model, CPU, seed=0)


def test_a_model_that_is_half_on_the_meta_device_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(InputError, match="partly on the meta device"):
        place(model, CPU, seed=0)
