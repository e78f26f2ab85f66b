"""Codecs of moments: exact levels, unbiased rounding, nothing stuck, nothing lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigtrain.optim.cost import LEAST_QUANTIZED_ELEMENTS, moment_bytes
from bigtrain.optim.pieces import Workspace
from bigtrain.optim.quantize import Binades, Blocks, Codec, Plain, Rounded, Squares, State, codec_for

USES = ["first", "second"]
STATES = ["bf16", "8bit", "4bit"]
LEVELS = {("first", "8bit"): 127, ("first", "4bit"): 7}


class Kept:
    """A moment that is kept by a codec, written and read as a whole, in pieces."""

    def __init__(self, use: str, state: str, elements: int, piece_elements: int = 2**20) -> None:
        self.codec: Codec = codec_for("moment", use, "fp32", 0)
        if state == "bf16":
            self.codec = Rounded("moment", use)
        elif state != "fp32":
            self.codec = Squares("moment", state) if use == "first" else Binades("moment", state)
        self.state: State = self.codec.allocate(torch.empty(elements))
        self.work = Workspace(torch.device("cpu"), min(piece_elements, elements))
        self.elements = elements

    def parts(self) -> list[tuple[Tensor, ...]]:
        return self.codec.split(self.state, self.work.elements)

    def counts(self) -> list[int]:
        size = self.work.elements
        return [min(size, self.elements - start) for start in range(0, self.elements, size)]

    def read(self) -> Tensor:
        pairs = zip(self.parts(), self.counts(), strict=True)
        return torch.cat([self.codec.load(views, count, self.work).clone() for views, count in pairs])

    def write(self, values: Tensor, step: int = 0) -> None:
        chunks = values.split(self.work.elements)
        for views, chunk, count in zip(self.parts(), chunks, self.counts(), strict=True):
            self.codec.load(views, count, self.work).copy_(chunk)
            self.codec.store(views, count, self.work, step)


def values_for(use: str, elements: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(elements, generator=generator) * torch.exp(spread * torch.randn(elements, generator=generator))
    return values if use == "first" else values.square()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("elements", [1, 127, 256, 300, 1000])
def test_states_begin_at_zero_and_weigh_what_the_cost_says(use: str, state: str, elements: int) -> None:
    kept = Kept(use, state, elements)
    assert torch.equal(kept.read(), torch.zeros(elements))
    large = Kept(use, state, LEAST_QUANTIZED_ELEMENTS + elements)
    held = sum(tensor.numel() * tensor.element_size() for tensor in large.state.values())
    assert held == moment_bytes(state, LEAST_QUANTIZED_ELEMENTS + elements)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("state", ["fp32", *STATES])
def test_levels_are_fixed_points_at_every_step(use: str, state: str) -> None:
    kept = Kept(use, state, 1000)
    kept.write(values_for(use, 1000))
    first = kept.read()
    for step in range(1, 200, 9):
        kept.write(kept.read(), step)
    torch.testing.assert_close(kept.read(), first, rtol=1e-5, atol=0)


@settings(max_examples=25)
@given(
    use=st.sampled_from(USES),
    state=st.sampled_from(STATES),
    elements=st.sampled_from([1, 300, 4096, 4500, 9000]),
    seed=st.integers(0, 99),
)
def test_pieces_are_read_as_they_were_written(use: str, state: str, elements: int, seed: int) -> None:
    values = values_for(use, elements, seed)
    kept, cut = Kept(use, state, elements), Kept(use, state, elements, 4096)
    kept.write(values)
    cut.write(values)
    assert torch.equal(kept.read()[:4096], cut.read()[:4096])
    assert bool(((kept.read() - cut.read()).abs() <= 2 * spacing(use, state, values)).all())


def spacing(use: str, state: str, values: Tensor) -> Tensor:
    """Return the distance of levels at values, at most."""
    if state == "bf16":
        return values.abs() * 2**-7
    block = {"8bit": 256, "4bit": 128}[state]
    padded = torch.cat([values, torch.zeros(-len(values) % block)]).view(-1, block)
    scale = padded.abs().amax(1, keepdim=True).expand_as(padded).reshape(-1)[: len(values)]
    if use == "first":
        levels = LEVELS[use, state]
        return scale * (2 * (values.abs() / scale.clamp(min=1e-30)).sqrt() * levels + 3) / levels**2
    share = {"8bit": 2**-3, "4bit": 1.0}[state]
    return torch.maximum(values * share, scale * {"8bit": 3e-10, "4bit": 4e-5}[state])


@settings(max_examples=25)
@given(use=st.sampled_from(USES), state=st.sampled_from(STATES), seed=st.integers(0, 99), step=st.integers(0, 5000))
def test_rounding_goes_to_a_neighbouring_level(use: str, state: str, seed: int, step: int) -> None:
    values = values_for(use, 600, seed)
    kept = Kept(use, state, 600)
    kept.write(values, step)
    assert bool(((kept.read() - values).abs() <= spacing(use, state, values) * (1 + 1e-5)).all())


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("state", STATES)
def test_rounding_is_unbiased_over_steps(use: str, state: str) -> None:
    values = values_for(use, 512, seed=4, spread=0.5)
    if use == "second":
        values = values.clamp(min=float(values.max()) * 1e-3)
    kept, total, steps = Kept(use, state, 512), torch.zeros(512, dtype=torch.float64), 1000
    for step in range(steps):
        kept.write(values, step)
        total += kept.read()
    error = (total / steps - values).abs()
    assert bool((error <= 0.006 * spacing(use, state, values)).all())


@pytest.mark.parametrize("state", STATES)
def test_an_average_that_changes_by_a_thousandth_a_step_is_not_stuck(state: str) -> None:
    """Without noise each of these would stay where it began for ever."""
    kept = Kept("second", state, 256)
    start = values_for("second", 256, seed=2, spread=0.0) + 0.1
    goal = start * 2
    goal[0] = start[0] = 20.0
    kept.write(start)
    for step in range(1, 3000):
        kept.write(kept.read().mul_(0.999).add_(goal, alpha=0.001), step)
    exact = goal + (start - goal) * 0.999**2999
    ratio = kept.read() / exact
    worst = {"bf16": 0.02, "8bit": 0.2, "4bit": 1.1}[state]
    assert bool(((ratio - 1).abs() <= worst).all())
    assert abs(float(ratio.mean()) - 1) <= {"bf16": 0.002, "8bit": 0.08, "4bit": 0.4}[state]


@pytest.mark.parametrize("state", ["8bit", "4bit"])
def test_a_positive_second_moment_never_becomes_zero(state: str) -> None:
    values = torch.logspace(-30, 0, 256)
    kept = Kept("second", state, 256)
    for step in range(20):
        kept.write(values, step)
        read = kept.read()
        assert bool((read > 0).all())
        blocks = read.view(-1, kept.codec.block if isinstance(kept.codec, Blocks) else 256)
        assert bool((blocks.amin(1) >= blocks.amax(1) * (2e-10 if state == "8bit" else 2e-5)).all())
        assert float(read.max()) == pytest.approx(1.0)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("state", ["8bit", "4bit"])
def test_a_block_of_zeros_stays_zero_beside_one_that_is_not(use: str, state: str) -> None:
    values = values_for(use, 512)
    values[256:] = 0
    kept = Kept(use, state, 512)
    for step in range(5):
        kept.write(values, step)
        assert torch.equal(kept.read()[256:], torch.zeros(256))


@pytest.mark.parametrize("state", ["8bit", "4bit"])
def test_signs_are_kept(state: str) -> None:
    values = torch.linspace(-1, 1, 512)
    kept = Kept("first", state, 512)
    kept.write(values)
    assert bool((kept.read() * values >= 0).all())
    torch.testing.assert_close(kept.read()[[0, -1]], torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("scale", [1e-28, 1e-12, 1e12, 1e28])
@pytest.mark.parametrize("use", USES)
def test_scales_of_any_size(use: str, scale: float) -> None:
    values = values_for(use, 256)
    one, other = Kept(use, "8bit", 256), Kept(use, "8bit", 256)
    one.write(values)
    other.write(values * scale)
    torch.testing.assert_close(other.read() / scale, one.read(), rtol=0.15, atol=1e-3)


def test_small_tensors_keep_fp32() -> None:
    assert type(codec_for("m", "first", "8bit", LEAST_QUANTIZED_ELEMENTS - 1)) is Plain
    assert isinstance(codec_for("m", "first", "8bit", LEAST_QUANTIZED_ELEMENTS), Blocks)
    assert isinstance(codec_for("m", "second", "bf16", 1), Rounded)


def test_8_bits_stand_in_the_parameters_shape() -> None:
    parameter = torch.empty(64, 65)
    state = codec_for("exp_avg", "first", "8bit", parameter.numel()).allocate(parameter)
    assert state["exp_avg"].shape == (64, 65)
    assert state["exp_avg_scale"].shape == (17,)
