"""Formats of weights: joining is exact, rounding unbiased, and what does not move stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bigtrain.errors import InputError
from bigtrain.optim.pieces import Workspace
from bigtrain.optim.weights import MASTER, Mastered, check_dtype, weight_format

FORMATS = ["fp32", "split24", "none"]


class Kept:
    """Weights that are kept in a format."""

    def __init__(self, name: str, values: Tensor) -> None:
        self.format = weight_format(name)
        self.parameter = values.to(self.format.dtype).clone()
        self.state = self.format.allocate(self.parameter)
        self.work = Workspace(torch.device("cpu"), values.numel())

    def read(self) -> Tensor:
        (views,) = self.format.split(self.parameter, self.state, self.parameter.numel())
        return self.format.load(views, self.work).clone()

    def write(self, values: Tensor, step: int = 0) -> None:
        (views,) = self.format.split(self.parameter, self.state, self.parameter.numel())
        self.format.load(views, self.work).copy_(values)
        self.format.store(views, self.work, step)


@pytest.mark.parametrize("name", FORMATS)
def test_a_new_format_reads_the_parameter(name: str) -> None:
    values = torch.randn(100)
    kept = Kept(name, values)
    assert torch.equal(kept.read(), kept.parameter.float())


def test_fp32_is_the_parameter_itself() -> None:
    kept = Kept("fp32", torch.randn(10))
    (views,) = kept.format.split(kept.parameter, {}, 10)
    assert kept.format.load(views, kept.work).data_ptr() == kept.parameter.data_ptr()


@given(bits=st.lists(st.integers(-(2**23), 2**23 - 1), min_size=1, max_size=50), step=st.integers(0, 9999))
def test_split24_keeps_24_bits_exactly(bits: list[int], step: int) -> None:
    values = (torch.tensor(bits, dtype=torch.int32) << 8).view(torch.float32)
    values = values[torch.isfinite(values) & (values.abs() < 3e38)]
    if not len(values):
        return
    kept = Kept("split24", torch.zeros(len(values)))
    kept.write(values, step)
    assert torch.equal(kept.read().view(torch.int32), values.view(torch.int32))
    assert bool(((kept.parameter.float() - values).abs() <= values.abs() * 2**-8 + 1e-40).all())


@given(seed=st.integers(0, 999), step=st.integers(0, 9999))
def test_split24_rounds_to_a_neighbour(seed: int, step: int) -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    kept = Kept("split24", torch.zeros(64))
    kept.write(values, step)
    assert bool(((kept.read() - values).abs() <= values.abs() * 2**-15).all())
    nearest = values.bfloat16().float()
    assert bool(((kept.parameter.float() - nearest).abs() <= values.abs() * 2**-7).all())


@pytest.mark.parametrize(("name", "bits"), [("split24", 15), ("none", 7)])
def test_updates_below_the_last_bit_add_up(name: str, bits: int) -> None:
    update, steps = 2.0**-bits / 50, 1000
    kept = Kept(name, torch.full((512,), 1.0))
    for step in range(steps):
        kept.write(kept.read() + update, step)
    moved = (kept.read() - 1) / (update * steps)
    assert bool(((moved - 1).abs() < 0.15).all())
    assert float(moved.mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_that_are_written_back_stay(name: str) -> None:
    kept = Kept(name, torch.randn(300))
    kept.write(torch.randn(300))
    before, parameter = kept.read(), kept.parameter.clone()
    for step in range(50):
        kept.write(kept.read(), step)
    assert torch.equal(kept.read(), before)
    assert torch.equal(kept.parameter, parameter)


@pytest.mark.parametrize("name", FORMATS)
def test_zero_stays_zero(name: str) -> None:
    kept = Kept(name, torch.ones(20))
    for step in range(50):
        kept.write(torch.zeros(20), step)
        assert torch.equal(kept.read(), torch.zeros(20))


def test_unknown_format() -> None:
    with pytest.raises(InputError, match="amp.master_weights: 'fp16' is none of fp32, split24, none"):
        weight_format("fp16")


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.bfloat16), ("split24", torch.float32), ("none", torch.float16)]
)
def test_parameters_of_another_dtype_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"of shape \(2, 3\) is .*master weights " + name):
        check_dtype(torch.zeros(2, 3, dtype=dtype), name)


def test_a_master_is_changed_and_its_parameter_is_it_rounded() -> None:
    master = torch.randn(10)
    before, parameter, work = master.clone(), torch.zeros(2, 5, dtype=torch.bfloat16), Workspace(torch.device("cpu"), 8)
    kept = Mastered(torch.bfloat16)
    for piece in kept.split(parameter, {MASTER: master.view(2, 5)}, 6):
        kept.load(piece, work).mul_(1.001)
        kept.store(piece, work, 0)
    assert torch.equal(master, before * 1.001)
    assert torch.equal(parameter.view(-1), master.bfloat16())
    assert kept.allocate(parameter) == {}  # there before the first step
