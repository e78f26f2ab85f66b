"""Offload: what is parked, when it leaves and comes back, and that nothing is used while a copy is under way."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain import recompute
from bigtrain.errors import InputError
from bigtrain.pinned import Pool
from bigtrain.recompute.blocks import follow
from bigtrain.recompute.offload import LEAST_BYTES, CudaCopies, Offloader


def activation(value: float, *shape: int) -> Tensor:
    """Return a tensor that is no leaf and starts with a number that tells it from others."""
    tensor = torch.full(shape or (4,), value, requires_grad=True)
    return tensor * 1


class Save(torch.autograd.Function):
    """An operation that saves what it is given."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, *others = saved = ctx.saved_tensors
        SEEN.append(tuple(tensor.detach() for tensor in saved))
        return grad.expand(first.shape), *(None for _ in others)


SEEN: list[tuple[Tensor, ...]] = []


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


def offloader(copies: Any, least_bytes: int = 1) -> tuple[Offloader, Pool]:
    pool = Pool(registered=False)
    return Offloader(copies, pool=pool, least_bytes=least_bytes), pool


def test_the_order_of_copies(host_copies: Any) -> None:
    """Out at once and free after its block; back one block ahead."""
    off, pool = offloader(host_copies)
    total = torch.zeros(())
    for value in (1.0, 2.0, 3.0):
        with off.inputs():
            part = Save.apply(activation(value))
        host_copies.log.append("block over")
        total = total + part
    assert host_copies.log == [
        *("start 1", "wait 1", "block over"),
        *("start 2", "wait 2", "block over"),
        *("start 3", "wait 3", "block over"),
    ]
    assert pool.held_bytes == 3 * 16
    host_copies.log.clear()
    total.backward()
    assert host_copies.log == ["start 3", "wait 3", "start 2", "wait 2", "start 1", "wait 1"]
    assert [float(tensors[0][0]) for tensors in SEEN] == [3, 2, 1]


def test_buffers_are_used_again(host_copies: Any) -> None:
    off, pool = offloader(host_copies)
    for _ in range(3):
        with off.inputs():
            first = Save.apply(activation(1.0))
        with off.inputs():
            second = Save.apply(activation(2.0))
        (first + second).backward()
        del first, second
    assert pool.held_bytes == 2 * 16


def test_what_stays_on_the_device(host_copies: Any) -> None:
    off, pool = offloader(host_copies, least_bytes=16)
    stays = (torch.ones(8), activation(5.0, 3), torch.arange(9), nn.Parameter(torch.ones(9)))
    with off.inputs():
        Save.apply(activation(1.0), *stays).backward()
    assert set(host_copies.log) == {"start 1", "wait 1"}
    assert pool.held_bytes == 16
    for saved, given in zip(SEEN[0][1:], stays, strict=True):
        assert saved.data_ptr() == given.data_ptr()


def test_the_default_size() -> None:
    assert LEAST_BYTES == 1 << 20


def test_each_tensor_is_parked_once(host_copies: Any) -> None:
    off, pool = offloader(host_copies)
    shared = activation(7.0)
    parts = []
    for _ in range(3):
        with off.inputs():
            parts.append(Save.apply(shared))
    assert pool.held_bytes == 16 and host_copies.log.count("start 7") == 1
    with torch.no_grad():
        shared += 1
    with off.inputs():
        parts.append(Save.apply(shared))
    assert pool.held_bytes == 32
    sum(parts).backward()
    assert [float(tensors[0][0]) for tensors in SEEN] == [8, 7, 7, 7]


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "expanded", "bf16"])
def test_layouts_come_back(host_copies: Any, layout: str) -> None:
    off, _ = offloader(host_copies)
    base = torch.randn(4, 6, requires_grad=True) * 1
    tensor = {
        "plain": lambda: base,
        "transposed": lambda: base.T,
        "sliced": lambda: base[:, 1:3],
        "expanded": lambda: base[None].expand(3, 4, 6),
        "bf16": lambda: base.bfloat16(),
    }[layout]()
    with off.inputs():
        Save.apply(tensor).backward()
    (saved,) = SEEN[0]
    assert torch.equal(saved, tensor) and saved.dtype == tensor.dtype
    if layout in ("plain", "transposed", "bf16"):
        assert saved.stride() == tensor.stride()


def test_a_graph_that_is_dropped_gives_everything_back(host_copies: Any) -> None:
    off, pool = offloader(host_copies)
    parts = []
    for value in (1.0, 2.0, 3.0):
        with off.inputs():
            parts.append(Save.apply(activation(value)))
    parts[2].backward()
    host_copies.log.clear()
    del parts
    gc.collect()
    assert host_copies.log == ["abandon 2"], "the second was on its way back"
    assert len(pool._free) == 3


def test_a_block_that_writes_to_its_input_is_refused(host_copies: Any) -> None:
    off, _ = offloader(host_copies)
    tensor = activation(1.0)
    with pytest.raises(InputError, match="changed its input in place"), off.inputs():
        Save.apply(tensor)
        with torch.no_grad():
            tensor += 1


def test_memory_that_cannot_be_pinned_is_an_error(host_copies: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    off, pool = offloader(host_copies)

    def refuse(size: int) -> Tensor:
        raise InputError(f"no {size} bytes")

    monkeypatch.setattr(pool, "take", refuse)
    with pytest.raises(InputError, match="no 16 bytes"), off.inputs():
        Save.apply(activation(1.0))
    assert not pool._free


def test_an_error_in_a_block_passes(host_copies: Any) -> None:
    off, _ = offloader(host_copies)
    with pytest.raises(KeyError), off.inputs():
        raise KeyError


def test_blocks_park_their_inputs_and_not_their_weights(host_copies: Any, torch_seed: int) -> None:
    off, pool = offloader(host_copies)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
    for block in blocks:
        follow(block, "offload", off)
    x = torch.randn(5, 8, requires_grad=True) * 1
    for block in blocks:
        x = block(x)
    assert pool.held_bytes == 4 * 5 * 8 * 4
    x.sum().backward()


@pytest.mark.gpu
def test_on_cuda_bitwise_and_less_memory() -> None:
    def build() -> nn.ModuleList:
        torch.manual_seed(0)
        parts = (
            nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024), nn.Dropout(0.1)) for _ in range(12)
        )
        return nn.ModuleList(parts).cuda()

    def step(blocks: nn.ModuleList) -> tuple[list[Tensor], int]:
        blocks.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(4096, 1024, device="cuda", requires_grad=True) * 1
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for block in blocks:
            x = x + block(x)
        left = torch.cuda.memory_allocated() - before
        x.square().mean().backward()
        torch.cuda.synchronize()
        return [p.grad.clone() for p in blocks.parameters()], left  # type: ignore[union-attr]

    blocks = build()
    plain, _ = step(blocks)
    recompute.apply(blocks, "full")
    full, held_full = step(blocks)
    recompute.apply(blocks, "offload")
    for _ in range(5):
        offloaded, held = step(blocks)
        assert all(torch.equal(one, other) for one, other in zip(plain, offloaded, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(plain, full, strict=True))
    row_bytes = 4096 * 1024 * 4
    assert held_full - held >= 10 * row_bytes


@pytest.mark.gpu
def test_copies_on_cuda_wait_for_each_other() -> None:
    copies = CudaCopies(torch.device("cuda"))
    off = Offloader(copies, least_bytes=1)
    for _ in range(20):
        parts = []
        for value in range(8):
            tensor = torch.full((1 << 22,), float(value), device="cuda", requires_grad=True) * 1
            with off.inputs():
                parts.append(Save.apply(tensor))
            del tensor
            torch.full((1 << 22,), -1.0, device="cuda")
        SEEN.clear()
        torch.stack(parts).sum().backward()
        assert [bool((tensors[0] == 7 - place).all()) for place, tensors in enumerate(SEEN)] == [True] * 8
