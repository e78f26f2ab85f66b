"""The loss scale follows overflows by arithmetic on the device alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bigtrain import amp
from bigtrain.amp import loss_scale
from bigtrain.amp.loss_scale import LARGEST, SMALLEST, START, LossScale

LOW = [torch.float32, torch.bfloat16, torch.float16]


def step(scale: LossScale, number: float) -> bool:
    found = scale.unscale_([torch.tensor([1.0, number])])
    scale.update(found)
    return bool(found)


@pytest.mark.parametrize("dtype", LOW)
def test_gradients_come_back_as_without_a_scale(dtype: torch.dtype) -> None:
    scale = LossScale("cpu")
    weight = torch.tensor([0.25, 0.5], dtype=dtype, requires_grad=True)
    scale.scale((weight.float() * torch.tensor([3.0, 0.001])).sum()).backward()
    assert weight.grad is not None
    if dtype != torch.float16:
        assert not scale.unscale_([weight.grad])
        torch.testing.assert_close(weight.grad.float(), torch.tensor([3.0, 0.001]), rtol=2**-8, atol=0)
    else:  # 3 x 65536 is beyond fp16
        assert scale.unscale_([weight.grad])


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_number_in_any_gradient_is_found(bad: float, place: int) -> None:
    gradients = [torch.ones(3), torch.ones(2, 2).bfloat16(), torch.ones(4)]
    gradients[place].view(-1)[-1] = bad
    found = LossScale("cpu").unscale_(gradients)
    assert (found.dtype, found.shape, float(found)) == (torch.float32, (), 1.0)


def test_halved_by_an_overflow_and_doubled_after_good_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    scale = LossScale("cpu")
    values = []
    for number in [1, float("inf"), 1, 1, float("nan"), 1, 1, 1, 1, 1, 1]:
        step(scale, number)
        values.append(float(scale.value) / START)
    assert values == [1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 1]


def test_it_grows_after_two_thousand_good_steps() -> None:
    scale = LossScale("cpu")
    scale.load_state_dict({"scale": START, "good_steps": 1998})
    step(scale, 1.0)
    assert float(scale.value) == START
    step(scale, 1.0)
    assert float(scale.value) == 2 * START


@given(overflows=st.lists(st.booleans(), max_size=60))
def test_it_stays_within_its_bounds(overflows: list[bool]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "GROWTH_STEPS", 1)
        scale = LossScale("cpu")
        expected = START
        for overflow in overflows:
            assert step(scale, float("inf") if overflow else 1.0) == overflow
            expected = min(max(expected * (0.5 if overflow else 2), SMALLEST), LARGEST)
            assert float(scale.value) == expected


def test_going_on_from_a_state_is_going_on() -> None:
    scale, other = LossScale("cpu"), LossScale("cpu")
    for number in [1.0, float("inf"), 1.0, 1.0]:
        step(scale, number)
    state = scale.state_dict()
    assert state == {"scale": START / 2, "good_steps": 2}
    other.load_state_dict(state)
    for each in (scale, other):
        step(each, float("inf"))
    assert scale.state_dict() == other.state_dict()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_other_precisions_have_a_constant_one_and_touch_nothing(precision: str) -> None:
    scale = amp.LossScale("cpu", precision=precision)
    loss, gradient = torch.tensor(3.0), torch.tensor([float("inf"), 2.0])
    assert scale.scale(loss) is loss
    found = scale.unscale_([gradient])
    scale.update(torch.ones(()))
    assert not found
    assert gradient[1] == 2.0
    assert scale.state_dict() == {"scale": 1.0, "good_steps": 0}


def test_no_gradients_at_all() -> None:
    assert not LossScale("cpu").unscale_([])


class Unread(torch.utils._python_dispatch.TorchDispatchMode):
    """Fail where a number is brought to the host."""

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_a_step_reads_nothing_back() -> None:
    scale = LossScale("cpu")
    gradients = [torch.ones(3), torch.ones(2).bfloat16()]
    with Unread():
        scale.scale(torch.tensor(1.0))
        scale.update(scale.unscale_(gradients))
        with pytest.raises(AssertionError, match="waits"):
            scale.state_dict()


@pytest.mark.slow
def test_all_ranks_skip_or_none(tmp_path: Path) -> None:
    mp.spawn(_rank, (tmp_path,), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}") for rank in range(2)]
    assert states == 2 * [[(1.0, START / 2), (0.0, START / 2), (1.0, START / 4)]]


def _rank(rank: int, folder: Path) -> None:
    """Take three steps: an overflow on rank 1, on none, on both."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    scale, steps = LossScale("cpu"), []
    inf = float("inf")
    gradients: list[Tensor] = [torch.tensor(numbers[rank]) for numbers in ((1.0, inf), (1.0, 1.0), (inf, inf))]
    for gradient in gradients:
        found = scale.unscale_([gradient])
        scale.update(found)
        steps.append((float(found), float(scale.value)))
    torch.save(steps, folder / f"{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_device_agrees_with_the_cpu(device: str) -> None:
    here, there = LossScale("cpu"), LossScale(device)
    for number in [1.0, float("nan"), 1.0]:
        step(here, number)
        found = there.unscale_([torch.tensor([1.0, number], device=device)])
        there.update(found)
    assert here.state_dict() == there.state_dict()
