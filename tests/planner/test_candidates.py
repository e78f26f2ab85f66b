"""What a recipe leaves open, counted."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.config.load import load_recipe
from bigtrain.config.schema import Recipe
from bigtrain.planner.candidates import divisors, mixes, policies, settings, shard_groups
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import Hardware

CPU = Hardware("cpu", "a processor", 1, 2**36)
CUDA = Hardware("cuda", "a GPU", 8, 2**36, capability=(9, 0))


def recipe(*overrides: str) -> Recipe:
    one = ("train.global_batch_size=64", "train.max_grad_norm=null", "train.compile=false")
    return load_recipe("quickstart_bert", [*one, *overrides])


def values(name: str, found: list[Choice]) -> list[object]:
    return list(dict.fromkeys(getattr(choice, name) for choice in found))


def test_what_is_written_stays() -> None:
    written = ("train.micro_batch_size=8", "optimizer.state=8bit", "sharding.zero_stage=3", "sharding.replicate=2",
               "sharding.offload=none")  # fmt: skip
    (only,) = settings(recipe(*written), CUDA, 8)
    assert only == Choice(8, 1, (), 3, 2, "none", "8bit", False, "fp32")


def test_micro_batches_are_divisors_of_a_rank_s_rows() -> None:
    assert values("micro_batch_size", settings(recipe(), CPU, 1)) == [1, 2, 4, 8, 16, 32, 64]
    shared = settings(recipe("sharding.zero_stage=0", "sharding.offload=none"), CUDA, 4)
    assert [(choice.micro_batch_size, choice.accumulation_steps) for choice in shared] == [
        (1, 16), (2, 8), (4, 4), (8, 2), (16, 1)
    ]  # fmt: skip


def test_what_changes_numbers_is_open_only_where_it_says_auto() -> None:
    plain = settings(recipe(), CPU, 1)
    assert values("optimizer_state", plain) == ["fp32"]
    assert values("master_weights", plain) == ["fp32"]
    assert values("gradient_release", plain) == [False]
    autos = ("optimizer.state=auto", "amp.master_weights=auto", "optimizer.gradient_release=auto")
    found = settings(recipe(*autos, "amp.precision=bf16"), CPU, 1)
    assert values("optimizer_state", found) == ["fp32", "bf16", "8bit", "4bit"]
    assert values("master_weights", found) == ["fp32", "split24", "none"]
    assert {choice.accumulation_steps for choice in found if choice.gradient_release} == {1}
    assert values("master_weights", settings(recipe(*autos), CPU, 1)) == ["fp32"]
    assert values("optimizer_state", settings(recipe(*autos, "optimizer.name=adafactor"), CPU, 1)) == ["fp32"]


def test_weights_too_coarse_for_the_learning_rate_are_not_proposed() -> None:
    slow = recipe("amp.master_weights=auto", "amp.precision=bf16", "optimizer.learning_rate=1e-5")
    assert values("master_weights", settings(slow, CPU, 1)) == ["fp32", "split24"]


def test_release_that_is_asked_for_leaves_one_micro_batch() -> None:
    assert values("micro_batch_size", settings(recipe("optimizer.gradient_release=true"), CPU, 1)) == [64]


def test_one_rank_shards_nothing_unless_asked() -> None:
    assert {(choice.zero_stage, choice.replicate) for choice in settings(recipe(), CUDA, 1)} == {(0, 1)}
    asked = settings(recipe("sharding.zero_stage=3"), CUDA, 1)
    assert {(choice.zero_stage, choice.replicate) for choice in asked} == {(3, 1)}


def test_micro_batches_divide_at_each_number_of_nodes() -> None:
    written = ("cluster.nodes=2:4", "cluster.devices_per_node=2", "train.global_batch_size=96", "sharding.zero_stage=0")
    assert values("micro_batch_size", settings(recipe(*written), CUDA, 4)) == [1, 2, 4]  # 24, 16, 12 rows a rank


def test_layouts_of_two_nodes() -> None:
    found = settings(recipe("cluster.devices_per_node=8"), CUDA, 16)
    layouts = {(choice.zero_stage, choice.replicate) for choice in found}
    assert layouts == {(0, 16)} | {(stage, groups) for stage in (1, 2, 3) for groups in (8, 4, 2, 1)}
    assert {choice.replicate for choice in settings(recipe("sharding.replicate=2"), CUDA, 16)} == {2}


def test_shard_groups_are_parts_of_a_node_and_doubling_nodes() -> None:
    assert shard_groups(32, 8) == [2, 4, 8, 16, 32]
    assert shard_groups(24, 8) == [2, 4, 8, 24]
    assert shard_groups(7, 8) == [7]
    assert shard_groups(1, 8) == []


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [size for size in range(1, number + 1) if number % size == 0]


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_mixes_are_all_counts_with_what_keeps_most_last(blocks: int) -> None:
    rows = mixes(recipe(), blocks, CPU)
    found = [policies(mix) for row in rows for mix in row]
    assert len(found) == len(set(found)) == (blocks + 1) * (blocks + 2) // 2
    order = ("full", "selective", "none")
    for mix in found:
        assert len(mix) == blocks
        assert [policy for policy, _ in groupby(mix)] == [policy for policy in order if policy in mix]
    assert found[0] == ("none",) * blocks
    assert found[-1] == ("full",) * blocks


def test_last_resort_puts_inputs_on_the_host() -> None:
    found = {policy for row in mixes(recipe(), 3, CUDA, offload=True) for mix in row for policy, _ in mix}
    assert found == {"offload", "selective", "none"}


def test_compiled_code_on_a_cpu_recomputes_whole_blocks() -> None:
    found = {policy for row in mixes(recipe("train.compile=true"), 3, CPU) for mix in row for policy, _ in mix}
    assert found == {"full", "none"}


def test_a_written_mix_is_the_only_one() -> None:
    ((mix,),) = mixes(recipe("recompute.policy=[none,full]"), 2, CPU)
    assert policies(mix) == ("none", "full")
