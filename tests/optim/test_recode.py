"""Moments out of their formats and into others: exact where they can be, else to the nearest level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigtrain.optim import recode
from bigtrain.optim.quantize import codec_for
from bigtrain.optim.recode import decode, encode

FORMATS = ("fp32", "bf16", "8bit", "4bit")
USES = ("first", "second")


def values_of(use: str, seed: int = 0, elements: int = 5000) -> Tensor:
    found = torch.randn(elements, generator=torch.Generator().manual_seed(seed))
    return found if use == "first" else found.square()


def there_and_back(state: str, use: str, values: Tensor) -> Tensor:
    codec = codec_for("m", use, state, values.numel())
    found = torch.full_like(values, torch.nan)
    decode(codec, encode(codec, values), found)
    return found


@pytest.mark.parametrize("use", USES)
def test_fp32_comes_back_to_the_bit(use: str) -> None:
    values = values_of(use).view(50, 100)
    assert torch.equal(there_and_back("fp32", use, values), values)


@pytest.mark.parametrize("use", USES)
def test_bf16_is_rounded_to_the_nearest(use: str) -> None:
    values = values_of(use)
    found = there_and_back("bf16", use, values)
    assert torch.equal(found, found.bfloat16().float())
    assert bool(((found - values).abs() <= (values.bfloat16().float() - values).abs()).all())


@pytest.mark.parametrize("state", ["8bit", "4bit"])
@pytest.mark.parametrize("use", USES)
@given(seed=st.integers(0, 100), elements=st.integers(4096, 9000))
@settings(max_examples=10, deadline=None)
def test_no_level_of_a_block_is_nearer(state: str, use: str, seed: int, elements: int) -> None:
    values = values_of(use, seed, elements)
    codec = codec_for("m", use, state, elements)
    kept = encode(codec, values)
    found = torch.empty_like(values)
    decode(codec, kept, found)
    block = codec.block  # type: ignore[attr-defined]
    levels = levels_of(state, use)
    for start in range(0, elements, block):
        scale = kept["m_scale"][start // block]
        wanted, near = values[start : start + block], found[start : start + block]
        nearest = (wanted[:, None] - levels * scale).abs().amin(1)
        assert bool(((wanted - near).abs() <= nearest * (1 + 1e-5) + scale * 1e-5 * levels.abs().max()).all())


def levels_of(state: str, use: str) -> Tensor:
    """Return what one block of the format can hold, for a scale of 1, from all of its codes."""
    codec = codec_for("m", use, state, 5000)
    codes = 256 if state == "8bit" else 16
    kept = codec.allocate(torch.empty(4096))
    if state == "8bit":
        numbers = torch.arange(codes).sub(128 if use == "first" else 0)
        kept["m"][:codes] = numbers.to(kept["m"].dtype)
    else:
        kept["m"][:codes] = torch.arange(codes, dtype=torch.uint8)
    kept["m_scale"].fill_(1.0)
    found = torch.empty(4096)
    decode(codec, kept, found)
    levels = found[:codes]
    return levels[levels.abs() <= (127**2 if state == "8bit" else 49)] if use == "first" else levels


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("use", USES)
def test_a_second_time_changes_almost_nothing(state: str, use: str) -> None:
    once = there_and_back(state, use, values_of(use))
    twice = there_and_back(state, use, once)
    assert torch.allclose(once, twice, rtol=1e-6, atol=0)


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("use", USES)
def test_zeros_stay_zeros(state: str, use: str) -> None:
    assert not bool(there_and_back(state, use, torch.zeros(4200)).any())


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("elements", [0, 1, 4095])
def test_few_elements_and_none(state: str, elements: int) -> None:
    values = values_of("first", elements=elements)
    tolerance = 0.01 if state == "bf16" else 0
    assert torch.allclose(there_and_back(state, "first", values), values, rtol=tolerance, atol=0)


@pytest.mark.parametrize("state", ["8bit", "4bit"])
def test_pieces_are_the_whole(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = values_of("first", elements=20000)
    whole = there_and_back(state, "first", values)
    monkeypatch.setattr(recode, "PIECE_ELEMENTS", 4096)
    assert torch.equal(there_and_back(state, "first", values), whole)
