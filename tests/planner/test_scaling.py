"""One recipe on many world sizes: a line each, what does not go says why, the picture is written."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.config.load import load_recipe
from bigtrain.config.schema import Recipe
from bigtrain.errors import InputError, RecipeError
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import of_name
from bigtrain.planner.links import Transfer
from bigtrain.planner.plan import plan
from bigtrain.planner.scaling import MOST_RANKS, Scale, scale, scaling_lines, scaling_picture, world_sizes
from bigtrain.planner.speed import StepSeconds
from bigtrain.sharding.cost import Collective

GPU = of_name("h100")
GATHER = Collective("all_gather", 2**30, 8, "shard", 2, 50, 0.5)


def recipe_of(*overrides: str) -> Recipe:
    shape = ["model.num_hidden_layers=2", "train.micro_batch_size=1", "recompute.policy=none"]
    return load_recipe("gpt2_124m", ["train.global_batch_size=64", *shape, *overrides])


def made_up(size: int, rate: float = 100.0, efficiency: float = 1.0, waiting: float = 0.1) -> Scale:
    return Scale(
        size,
        choice=Choice(4, 1, ("none",) * 2, zero_stage=1, replicate=2),
        device_bytes=2**30,
        seconds=StepSeconds(0.3, 0.5, 0.0, 0.2 - waiting, waiting),
        tokens_per_second=rate * size,
        mfu=0.5,
        efficiency=efficiency,
        transfers=(Transfer(GATHER, "NVLink", 0.004),),
    )


def test_one_number_is_one_size() -> None:
    assert world_sizes("64") == 64
    assert world_sizes(" 1 ") == 1


def test_a_range_doubles() -> None:
    assert world_sizes("8..64") == [8, 16, 32, 64]
    assert world_sizes("6..40") == [6, 12, 24]
    assert world_sizes("8..8") == [8]


@given(st.integers(1, MOST_RANKS), st.integers(1, MOST_RANKS))
def test_a_range_stays_within_its_ends(first: int, last: int) -> None:
    first, last = sorted((first, last))
    sizes = world_sizes(f"{first}..{last}")
    assert isinstance(sizes, list)
    assert sizes[0] == first and sizes[-1] <= last < 2 * sizes[-1]
    assert all(b == 2 * a for a, b in pairwise(sizes))


@pytest.mark.parametrize(
    "text", ["", "0", "-8", "8..", "..8", "16..8", "0..8", "many", "8...16", "1.5", "9999999", "8-16"]
)
def test_what_is_no_number_of_ranks(text: str) -> None:
    with pytest.raises(InputError, match=r"command line: --world-size: .* is no number of ranks .*write 64, or"):
        world_sizes(text)


def test_each_size_is_planned_as_it_is_alone() -> None:
    found = scale(recipe_of(), GPU, [8, 16])
    for one in found:
        alone = plan(recipe_of(), GPU, world_size=one.world_size)
        assert one.choice == alone.choice
        assert one.seconds == alone.seconds
        assert one.device_bytes == alone.memory.device_bytes_peak
        assert one.tokens_per_second == alone.tokens_per_second
        assert one.mfu == alone.mfu
        assert one.transfers == alone.transfers


def test_efficiency_is_against_the_smallest_that_goes() -> None:
    first, second = scale(recipe_of(), GPU, [8, 64])
    assert first.efficiency == 1
    assert second.efficiency == pytest.approx(second.rank_tokens_per_second / first.rank_tokens_per_second)


def test_too_few_rows_are_a_reason_and_not_the_end() -> None:
    found = scale(recipe_of(), GPU, [64, 128])
    assert found[0].choice is not None
    assert found[1].choice is None and found[1].reason == "64 rows for 128 ranks are less than one for each"
    assert found[1].as_object() == {"world_size": 128, "choice": None, "reason": found[1].reason}


def test_rows_that_do_not_divide_are_a_reason() -> None:
    (first, second) = scale(recipe_of(), GPU, [8, 24])
    assert first.choice is not None
    assert "64 is not divisible by micro_batch_size 1 x 24 ranks" in second.reason


def test_what_is_wrong_at_every_size_is_an_error() -> None:
    with pytest.raises(RecipeError, match="64 is not divisible by micro_batch_size 1 x 128 ranks"):
        scale(recipe_of(), GPU, [128, 256])


def test_what_does_not_fit_says_by_how_much() -> None:
    large = load_recipe("gpt_7b", ["train.global_batch_size=8", "sharding.offload=none", "train.micro_batch_size=1"])
    first, second = scale(large, GPU, [1, 8])
    assert first.choice is None and first.reason.endswith("GiB over the budget at least")
    assert second.choice is not None and second.efficiency == 1


def test_what_is_offloaded_has_to_fit_the_host() -> None:
    keys = ["sharding.offload=optimizer", "optimizer.state=fp32", "train.micro_batch_size=1", "sharding.zero_stage=0"]
    (one,) = scale(load_recipe("gpt_70b", ["train.global_batch_size=8", "memory.budget=79GiB", *keys]), GPU, [8])
    assert one.choice is None and one.reason


def test_a_scale_as_an_object() -> None:
    found = made_up(64).as_object()
    assert found["tokens_per_second_per_rank"] == 100
    assert found["communication"] == {
        "seconds": pytest.approx(0.2),
        "exposed_seconds": 0.1,
        "collectives": [Transfer(GATHER, "NVLink", 0.004).as_object()],
    }
    assert {"choice", "seconds_per_step", "mfu", "efficiency", "device_bytes_peak"} <= set(found)


def test_lines_are_a_table() -> None:
    lines = list(scaling_lines([made_up(8), made_up(1024, 50.0, 0.5), Scale(2048, "too few")]))
    assert lines[0].split() == [
        "ranks", "tokens/s", "of", "a", "rank", "efficiency", "MFU", "memory", "sending", "exposed", "choice",
    ]  # fmt: skip
    assert lines[1].split()[:4] == ["8", "800", "100", "100%"]
    assert lines[2].split()[:4] == ["1,024", "51,200", "50", "50%"]
    assert lines[1].count("█") == 2 * lines[2].count("█") == 16
    assert "1.00 GiB" in lines[1] and "200 ms" in lines[1] and "10.0%" in lines[1]
    assert lines[1].endswith("micro-batch 4, recompute none, ZeRO 1 x 2")
    assert lines[3].split() == ["2,048", "too", "few"]
    assert lines[-1].startswith("predicted")


def test_one_rank_waits_for_nobody() -> None:
    (one,) = scale(recipe_of(), GPU, [1])
    assert one.transfers == () and one.exposed_share == 0 and one.sending_seconds == 0
    assert Scale(4, "why").exposed_share == 0


def test_the_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "scaling.png"
    curves = {
        "one": [made_up(8), made_up(16), Scale(32, "no")],
        "two": [made_up(8, waiting=0.0)],
        "none": [Scale(8, "no")],
    }
    scaling_picture(curves, path, title="made up")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name another file"):
        scaling_picture({"one": [made_up(8)]}, tmp_path / "none" / "x.png")
