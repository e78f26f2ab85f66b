"""Choices in words, shares as bars."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies

from bigtrain.planner.choice import Choice
from bigtrain.planner.words import BAR_WIDTH, bar, choice_lines, different_words, short_choice


def choice(**keys: Any) -> Choice:
    return Choice(**{"micro_batch_size": 8, "accumulation_steps": 4, "recompute": ("none",) * 4, **keys})


def words(world_size: int = 1, **keys: Any) -> str:
    return "\n".join(choice_lines(choice(**keys), world_size))


def test_ranks_that_share_products_are_told() -> None:
    alone = list(choice_lines(choice(), 2, 2))
    assert "products shared by 2 neighbouring ranks, which read the same rows" in alone
    assert not any("ZeRO" in line for line in alone)
    assert "ZeRO stage 3 over 4 such groups" in list(choice_lines(choice(zero_stage=3), 8, 2))


def test_the_plainest_choice() -> None:
    assert list(choice_lines(choice(), 1)) == [
        "micro-batches of 8, 4 to a step",
        "recompute none",
        "optimizer states in fp32, master weights fp32",
    ]
    assert short_choice(choice()) == "micro-batch 8, recompute none"


def test_one_micro_batch_is_one() -> None:
    assert "micro-batches of 8, one to a step" in words(accumulation_steps=1)


def test_blocks_may_differ() -> None:
    mixed = ("full", "full", "selective", "none")
    assert "recompute full in 2 then selective in 1 then none in 1 blocks" in words(recompute=mixed)
    assert "recompute full in 2 then" in short_choice(choice(recompute=mixed))


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({}, "each of 16 ranks holds everything (ZeRO stage 0)"),
        ({"zero_stage": 2}, "ZeRO stage 2 over 16 ranks"),
        ({"zero_stage": 3, "replicate": 4}, "ZeRO stage 3 in 4 groups of 4 ranks"),
    ],
)
def test_sharding_is_said_of_several_ranks(keys: dict[str, int], text: str) -> None:
    assert text in words(16, **keys).splitlines()
    assert "ZeRO" not in words(1, **keys)


def test_what_is_lean_is_said() -> None:
    lean = {"offload": "optimizer", "optimizer_state": "8bit", "master_weights": "split24", "gradient_release": True}
    text = words(**lean)
    assert "offloaded to the host: optimizer" in text
    assert "optimizer states in 8bit, master weights split24, gradients released as they come" in text
    short = short_choice(choice(zero_stage=1, **lean))
    assert short.startswith("micro-batch 8, recompute none, ZeRO 1, offload optimizer, 8bit states, ")
    assert short.endswith("master weights split24, gradient release")


def test_groups_of_ranks_are_told_apart() -> None:
    assert short_choice(choice(zero_stage=3, replicate=2)).endswith("ZeRO 3 x 2")
    assert short_choice(choice(zero_stage=3)).endswith("ZeRO 3")


@pytest.mark.parametrize(
    ("different", "text"),
    [
        ({"micro_batch_size": 16}, "micro_batch_size=16"),
        ({"zero_stage": 1, "offload": "optimizer"}, "zero_stage=1, offload=optimizer"),
        ({"recompute": "full"}, "recompute=full"),
        ({"recompute": ["full", "full", "none"]}, "recompute=full in 2 then none in 1 blocks"),
        ({"gradient_release": True}, "gradient_release=true"),
    ],
)
def test_what_is_different(different: dict[str, object], text: str) -> None:
    assert different_words(different) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, ""),
        (1e-9, "▏"),
        (0.5, "█████"),
        (0.51, "█████▏"),
        (0.55, "█████▌"),
        (0.999, "██████████"),
        (7, "██████████"),
    ],
)
def test_bars(share: float, text: str) -> None:
    assert bar(share, 10) == text


@given(strategies.floats(0, 2), strategies.floats(0, 2))
def test_longer_shares_have_no_shorter_bars(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert len(bar(low)) <= len(bar(high)) <= BAR_WIDTH
