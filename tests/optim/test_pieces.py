"""Pieces, buffers and the noise, on both ways of reading it."""

from __future__ import annotations

import pytest
import torch

from bigtrain.optim.cost import DITHER_WINDOWS
from bigtrain.optim.pieces import Workspace, shift, split

CPU = torch.device("cpu")
USES = [("weights", 8), ("weights", 16), ("first", 0), ("first", 16), ("second", 16), ("second", 20), ("second", 23)]


def test_split_is_flat_and_whole() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    assert [len(part) for part in split(tensor, 5)] == [5, 5, 2]
    assert torch.equal(torch.cat(split(tensor, 5)), tensor.view(-1))
    assert split(torch.empty(0, 3), 5) == []


def test_split_refuses_what_it_would_have_to_copy() -> None:
    with pytest.raises(RuntimeError, match="view"):
        split(torch.zeros(3, 4).T, 5)


def test_a_room_has_a_size_of_its_own_and_grows() -> None:
    work = Workspace(CPU, 300)
    room = work.room("columns", 7)
    assert room.shape == (7,)
    assert work.room("columns", 5) is room
    assert work.room("columns", 9).shape == (9,)


def test_views_are_of_one_buffer_filled_up_to_blocks() -> None:
    work = Workspace(CPU, 300)
    assert work.elements == 4096
    floats, integers, rows = work.floats("a", 512), work.integers("a", 300), work.rows("a", 512, 128)
    floats.fill_(1.0)
    assert bool((integers == 127 << 23).all())
    assert rows.shape == (4, 128)
    assert work.floats("a", 10).data_ptr() == floats.data_ptr() != work.floats("b", 10).data_ptr()
    assert work.noisy("a", 5000 - 4096).shape == (1, 4096)
    assert work.noisy("a", 1).dtype == torch.int32
    assert work.noisy("a", 1, integers=False).dtype == torch.float32
    assert work.floats("a", 10) is work.floats("a", 10)


@pytest.mark.parametrize(("use", "bits"), USES)
def test_noise_is_within_its_bounds_and_even(use: str, bits: int) -> None:
    noise = Workspace(CPU, 4096).noise(use, bits, 17)
    assert noise.dtype == (torch.int32 if bits else torch.float32)
    top = 2**bits if bits else 1
    assert int(noise.min()) >= 0
    assert float(noise.max()) < top
    assert float(noise.double().mean()) == pytest.approx(top / 2, rel=0.01)


@pytest.mark.parametrize(("use", "bits"), USES)
def test_an_elements_noise_is_even_over_steps(use: str, bits: int) -> None:
    work = Workspace(CPU, 8)
    top = 2**bits if bits else 1
    seen = torch.stack([work.noise(use, bits, step).double() / top for step in range(100)])
    assert bool(((seen.mean(0) - 0.5).abs() < 0.02).all())
    for share in (0.1, 0.5, 0.9):
        assert bool((((seen < share).double().mean(0) - share).abs() <= 0.04).all())


def test_windows_come_round() -> None:
    work = Workspace(CPU, 8)
    assert torch.equal(work.noise("first", 0, 3), work.noise("first", 0, 3 + DITHER_WINDOWS))


@pytest.mark.parametrize(("use", "bits"), USES)
def test_a_window_that_stays_on_the_device_is_the_same(use: str, bits: int) -> None:
    work = Workspace(CPU, 100)
    for window in (0, 5, DITHER_WINDOWS + 9):
        on_device = torch.tensor(window, dtype=torch.int32)
        assert torch.equal(work.noise(use, bits, on_device), work.noise(use, bits, window))


def test_the_window_is_the_step() -> None:
    assert Workspace(CPU, 8).window(torch.tensor(7.0)) == 7


def test_shifts_are_made_once() -> None:
    assert shift(16) is shift(16)
    assert int(torch.tensor(3, dtype=torch.int32) << shift(4)) == 48
