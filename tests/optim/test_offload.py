"""Offloaded optimizers: bit for bit those that keep everything, under whatever else happens to a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain.errors import InputError
from bigtrain.optim import Adafactor, AdamW, Lamb, Muon
from bigtrain.optim.cost import STATES
from bigtrain.optim.offload import keep_on_host, kept_weights
from bigtrain.optim.piecewise import Piecewise
from bigtrain.optim.release import release
from bigtrain.optim.weights import MASTER

CPU = torch.device("cpu")
SHAPES = ((64, 2100), (70, 80), (4099,), (33,), (0, 5))
"""More than one piece, one piece that is quantized, one that has a rest, one that is too small, and none."""

CASES = [
    (name, state, kept)
    for name, state, kept in product(("adamw", "lamb", "muon", "adafactor"), STATES, ("fp32", "split24", "none"))
    if name != "adafactor" or state == "fp32"
]


def weights(kept: str = "fp32", device: torch.device = CPU) -> list[nn.Parameter]:
    torch.manual_seed(1)
    dtype = torch.float32 if kept == "fp32" else torch.bfloat16
    return [nn.Parameter(torch.randn(shape).to(dtype).to(device)) for shape in SHAPES]


def optimizer(name: str, parameters: list[nn.Parameter], state: str = "fp32", kept: str = "fp32") -> Piecewise:
    formats: dict[str, Any] = {"weight_decay": 0.1, "master_weights": kept}
    if name == "adafactor":
        return Adafactor(parameters, **formats)
    if name != "muon":
        return {"adamw": AdamW, "lamb": Lamb}[name](parameters, state=state, **formats)
    matrices = [p for p in parameters if p.ndim == 2 and p.numel()]
    rest = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    return Muon([{"params": matrices, "orthogonal": True}, {"params": rest}], state=state, **formats)


def give_gradients(step: int, *sets: list[nn.Parameter], dtype: torch.dtype | None = None) -> None:
    torch.manual_seed(step)
    for same in zip(*sets, strict=True):
        gradient = torch.randn(same[0].shape)
        gradient = gradient.to(dtype).float() if dtype is not None else gradient
        for parameter in same:
            parameter.grad = gradient.to(parameter.device, parameter.dtype, copy=True)


def run(here: Piecewise, there: Piecewise, *sets: list[nn.Parameter], steps: int = 5, skipped: int = 2) -> None:
    """Take steps with both; one of them is left out."""
    for step in range(steps):
        give_gradients(step, *sets)
        for one in (here, there):
            one.found_inf = torch.tensor(float(step == skipped), device=sets[1][0].device)
            one.param_groups[0]["lr"] = 1e-2 / (1 + step)
            one.step()


def assert_same(here: Piecewise, there: Piecewise, ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert list(here.state[mine]) == list(there.state[other])
        for key, value in here.state[mine].items():
            assert torch.equal(value, there.state[other][key].to(value.device)), key


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(("name", "state", "kept"), CASES)
def test_bit_for_bit(name: str, state: str, kept: str, everything: bool) -> None:
    ours, theirs = weights(kept), weights(kept)
    here, there = optimizer(name, ours, state, kept), optimizer(name, theirs, state, kept)
    keep_on_host(there, CPU, everything=everything)
    run(here, there, ours, theirs)
    assert_same(here, there, ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "state"), [(name, state) for name, state, kept in CASES if kept == "fp32"])
def test_masters_are_the_weights_and_the_device_has_them_rounded(name: str, state: str, dtype: torch.dtype) -> None:
    ours, theirs = weights(), weights()
    here, there = optimizer(name, ours, state), optimizer(name, theirs, state)
    keep_on_host(there, CPU, dtype=dtype)
    for step in range(4):
        give_gradients(step, theirs, ours, dtype=dtype)
        here.step()
        there.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert other.dtype == dtype
        assert torch.equal(kept_weights(there, other), mine)
        assert torch.equal(other, mine.to(dtype))
        states = {key: value for key, value in there.state[other].items() if key != MASTER}
        assert all(torch.equal(value, here.state[mine][key]) for key, value in states.items())


def test_sums_of_micro_batches_may_stay_fp32() -> None:
    parameter = nn.Parameter(torch.ones(3))
    keep_on_host(AdamW([parameter]), CPU, dtype=torch.bfloat16, gradient_dtype=torch.float32)
    (parameter.float() * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert parameter.grad is not None
    assert (parameter.dtype, parameter.grad.dtype) == (torch.bfloat16, torch.float32)


def test_a_state_is_one_buffer_and_its_count_is_not_in_it() -> None:
    parameters, others = weights(), weights()
    there = optimizer("adamw", parameters, "8bit")
    keep_on_host(there, CPU)
    run(optimizer("adamw", others, "8bit"), there, others, parameters, steps=1)
    state = dict(there.state[parameters[0]])
    step = state.pop("step")
    (size,) = {tensor.untyped_storage().nbytes() for tensor in state.values()}
    assert size == sum(tensor.nbytes for tensor in state.values())
    assert step.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("clip", [None, 0.1])
def test_clipping_is_no_business_of_it(clip: float | None) -> None:
    ours, theirs = weights(), weights()
    here, there = optimizer("adamw", ours), optimizer("adamw", theirs)
    keep_on_host(there, CPU, everything=True)
    for step in range(3):
        give_gradients(step, ours, theirs)
        for parameters, one in ((ours, here), (theirs, there)):
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            one.step()
    assert_same(here, there, ours, theirs)


def test_gradient_release_updates_through_it() -> None:
    ours, theirs = weights(), weights()
    here, there = optimizer("adamw", ours, "8bit"), optimizer("adamw", theirs, "8bit")
    keep_on_host(there, CPU)
    for parameters, one in ((ours, here), (theirs, there)):
        released = release(parameters, one)
        for step in range(3):
            torch.manual_seed(step)
            torch.stack([(p.square() * torch.randn(p.shape)).sum() for p in parameters]).sum().backward()
            released.take_norm()
    assert all(p.grad is None for p in theirs)
    assert_same(here, there, ours, theirs)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("state", ["fp32", "4bit"])
def test_states_are_saved_and_loaded(state: str, dtype: torch.dtype | None) -> None:
    ours, theirs = weights(), weights()
    here, there = optimizer("adamw", ours, state), optimizer("adamw", theirs, state)
    for one in (here, there):
        keep_on_host(one, CPU, dtype=dtype)
    give_gradients(0, ours, theirs)
    here.step()
    there.step()
    give_gradients(1, ours)
    here.step()
    saved = copy.deepcopy(here.state_dict())
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            other.copy_(mine)
    there.load_state_dict(saved)
    assert_same(here, there, ours, theirs)
    storages = [t.untyped_storage().data_ptr() for key, t in there.state[theirs[0]].items() if key != "step"]
    assert len(set(storages)) == 1
    run(here, there, ours, theirs, steps=2)
    assert_same(here, there, ours, theirs)


def test_weights_of_a_checkpoint_are_the_masters() -> None:
    narrow, plain = weights(), weights()
    there, here = optimizer("adamw", narrow), optimizer("adamw", plain)
    keep_on_host(there, CPU, dtype=torch.bfloat16)
    for mine, other in zip(plain, narrow, strict=True):
        assert torch.equal(kept_weights(there, other), mine)
        assert kept_weights(here, mine).data_ptr() == mine.data_ptr()
        assert mine not in here.state


def test_what_cannot_be_offloaded() -> None:
    parameters = weights()
    with pytest.raises(InputError, match=r"the states of SGD stay on the device; use an optimizer of bigtrain\.optim"):
        keep_on_host(torch.optim.SGD(parameters), CPU)
    stepped = optimizer("adamw", parameters)
    give_gradients(0, parameters)
    stepped.step()
    with pytest.raises(InputError, match="an? AdamW has taken steps; offload it before the first"):
        keep_on_host(stepped, CPU)
    with pytest.raises(InputError, match=r"kept in bf16 are as they compute; use amp\.master_weights=fp32"):
        keep_on_host(optimizer("adamw", weights("none"), kept="none"), CPU, dtype=torch.bfloat16)


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    torch.manual_seed(0)
    yield torch.device("cuda")
    torch.cuda.synchronize()


def on_host(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(parameter.detach().cpu().pin_memory()) for parameter in parameters]


@pytest.mark.gpu
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(("name", "state", "kept"), CASES)
def test_bit_for_bit_on_cuda(name: str, state: str, kept: str, everything: bool, cuda: torch.device) -> None:
    ours, theirs = weights(kept, cuda), weights(kept, cuda)
    theirs = on_host(theirs) if everything else theirs
    here, there = optimizer(name, ours, state, kept), optimizer(name, theirs, state, kept)
    keep_on_host(there, cuda, everything=everything)
    for step in range(5):
        give_gradients(step, ours, theirs)
        for one in (here, there):
            one.found_inf = torch.tensor(float(step == 2), device=cuda)
            one.step()
    torch.cuda.synchronize()
    assert_states_wait_on_the_host(there, theirs)
    assert all(torch.equal(mine.cpu(), other.cpu()) for mine, other in zip(ours, theirs, strict=True))
    for mine, other in zip(ours, theirs, strict=True):
        state_of: dict[str, Tensor] = there.state[other]
        assert all(torch.equal(value.cpu(), state_of[key].cpu()) for key, value in here.state[mine].items())


def assert_states_wait_on_the_host(there: Piecewise, parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        for key, value in there.state[parameter].items():
            assert value.device.type == ("cuda" if key in there.resident else "cpu"), key
