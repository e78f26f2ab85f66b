"""Predicted steps: parts add up, devices are in order, and a call is cheap."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.model import ModelConfig
from bigtrain.config.schema import Recipe
from bigtrain.planner.choice import Choice
from bigtrain.planner.devices import devices
from bigtrain.planner.hardware import Hardware, of_name
from bigtrain.planner.links import links_of
from bigtrain.planner.rates import MEASURES, key
from bigtrain.planner.speed import Speed, StepSeconds

BLOCKS = 12


def recipe(**sections: Any) -> Recipe:
    train = {"objective": "clm", "steps": 10, "global_batch_size": 512, **sections.pop("train", {})}
    return Recipe.model_validate(
        {
            "name": "gpt",
            "model": {"family": "gpt", "hidden_size": 768, "num_hidden_layers": BLOCKS, "num_attention_heads": 12},
            "data": {"vocab_size": 50257, "sequence_length": 1024},
            "train": train,
            "optimizer": {"learning_rate": 1e-2, **sections.pop("optimizer", {})},
            "amp": {"precision": "bf16"},
            **sections,
        }
    )


MODEL = ModelConfig(
    family="gpt",
    vocab_size=50257,
    hidden_size=768,
    num_hidden_layers=BLOCKS,
    num_attention_heads=12,
    num_key_value_heads=12,
    intermediate_size=3072,
    max_position_embeddings=1024,
    initializer_range=0.02,
    norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=True,
)


def choice(rows: int = 16, policy: str = "none", *, world_size: int = 1, **keys: Any) -> Choice:
    return Choice(rows, 512 // (rows * world_size), (policy,) * BLOCKS, **keys)


def speed(name: str = "a100-80gb", world_size: int = 1, **sections: Any) -> Speed:
    return Speed(recipe(**sections), MODEL, of_name(name), world_size)


def test_the_parts_are_the_step() -> None:
    seconds = StepSeconds(1, 2, 4, 8, 16, 32)
    assert seconds.total == 63
    assert sum(dataclasses.astuple(seconds)) == 63


def test_a_known_model_on_a_known_device() -> None:
    """GPT-2 124M on an A100; the band is wide, since nothing was measured there."""
    one = speed(train={"compile": True})
    seconds = one.seconds(choice())
    assert 100e3 < one.tokens_per_second(seconds) < 250e3
    assert 0.3 < one.mfu(seconds, 8.6e8) < 0.65
    assert one.source == "table"


@pytest.mark.parametrize("name", sorted(devices()))
def test_every_device_of_the_table_has_a_speed(name: str) -> None:
    one = speed(name, amp={"precision": "fp32"})
    seconds = one.seconds(choice(4))
    assert 0 < seconds.forward_seconds < seconds.total
    assert 0 < one.mfu(seconds, 8.6e8) < 1


def test_faster_devices_are_faster() -> None:
    names = ("cpu-laptop", "rtx3060", "rtx4090", "a100-80gb", "h100", "b200")
    totals = [speed(name).seconds(choice()).total for name in names]
    assert totals == sorted(totals, reverse=True)


def test_recomputation_adds_what_the_blocks_repeat() -> None:
    one = speed()
    none, selective, full = (one.seconds(choice(policy=policy)) for policy in ("none", "selective", "full"))
    assert none.recompute_seconds == 0
    assert 0 < selective.recompute_seconds < full.recompute_seconds < full.forward_seconds
    assert none.forward_seconds == full.forward_seconds
    mixed = dataclasses.replace(choice(), recompute=("full",) * 3 + ("none",) * (BLOCKS - 3))
    assert one.seconds(mixed).recompute_seconds == pytest.approx(full.recompute_seconds / 4)


def test_offloaded_inputs_cost_a_full_recomputation_and_what_copies_do_not_hide() -> None:
    one = speed()
    full, offload = one.seconds(choice(policy="full")), one.seconds(choice(policy="offload"))
    assert offload.recompute_seconds == full.recompute_seconds
    assert full.offload_seconds == 0 < offload.offload_seconds


def test_larger_micro_batches_are_no_slower_on_a_gpu() -> None:
    one = speed()
    totals = [one.seconds(choice(rows)).total for rows in (1, 4, 16, 64)]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("state", ["bf16", "8bit", "4bit"])
def test_states_in_few_bits_take_longer_to_update(state: str) -> None:
    one = speed()
    assert one.seconds(choice(optimizer_state=state)).optimizer_seconds > one.seconds(choice()).optimizer_seconds


def test_release_leaves_out_clipping() -> None:
    one = speed(train={"max_grad_norm": None})
    clipped = speed().seconds(choice()).optimizer_seconds
    assert one.seconds(choice()).optimizer_seconds < clipped
    assert one.seconds(choice(gradient_release=True)).optimizer_seconds < clipped


def test_one_process_sends_nothing() -> None:
    assert speed().seconds(choice(zero_stage=3)).communication_seconds == 0


def test_ranks_send_more_with_more_stages_and_update_less() -> None:
    one = speed("h100", 64)
    found = {stage: one.seconds(choice(1, world_size=64, zero_stage=stage)) for stage in (1, 2, 3)}
    whole = one.seconds(choice(1, world_size=64, zero_stage=0, replicate=64))
    assert found[1].communication_seconds <= found[2].communication_seconds <= found[3].communication_seconds
    assert found[3].optimizer_seconds < whole.optimizer_seconds
    assert whole.communication_seconds > 0


def test_sharding_within_a_node_is_faster_than_across_nodes() -> None:
    one = speed("h100", 64)
    wide = one.seconds(choice(1, world_size=64, zero_stage=3))
    hybrid = one.seconds(choice(1, world_size=64, zero_stage=3, replicate=8))
    assert hybrid.communication_seconds < wide.communication_seconds


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_offloaded_states_cross_the_host_link(offload: str) -> None:
    one = speed("h100")
    seconds = one.seconds(choice(offload=offload)).offload_seconds
    states = 2 * 8 * 124e6 / links_of(of_name("h100"), recipe()).host_bytes_per_second
    assert seconds >= states
    assert speed("h100", 8).seconds(choice(world_size=8, zero_stage=3, offload=offload)).offload_seconds < seconds


def test_tokens_of_all_ranks_count() -> None:
    one = speed("h100", 8)
    seconds = StepSeconds(1.0, 0.5, 0.25, 0.25)
    assert one.tokens_per_second(seconds) == 512 * 1024 / 2
    assert one.mfu(seconds, 1e9) == pytest.approx(1e9 * 512 * 1024 / 2 / 8 / 989.4e12)


def test_measured_rates_are_used_on_this_machine_and_named(tmp_path: Path) -> None:
    here = Hardware("cpu", "a processor", 1, 2**34, threads=2)
    rates = dict.fromkeys(MEASURES, 1e10) | {"product_flops_per_second": 7e10, "thin_product_flops_per_second": 5e10}
    settings = recipe(amp={"precision": "fp32"}, data={"vocab_size": 50257, "cache": str(tmp_path)})
    before = Speed(settings, MODEL, here, 1)
    (tmp_path / "rates.json").write_text(json.dumps({key(here, "fp32", 2, "2.13.0"): rates}))
    after = Speed(settings, MODEL, here, 1)
    assert before.source.startswith("default")
    assert after.source == "measured here"
    assert after.peak_flops_per_second == 7e10
    assert after.seconds(choice()).total != before.seconds(choice()).total


def test_what_depends_on_the_micro_batch_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, counted = speed(), []
    original = Speed._pass

    def counting(self: Speed, picked: Choice) -> Any:
        counted.append(picked)
        return original(self, picked)

    monkeypatch.setattr(Speed, "_pass", counting)
    for rows in (4, 8):
        for policy in ("none", "selective", "full"):
            for state in ("fp32", "8bit"):
                one.seconds(choice(rows, policy, optimizer_state=state))
    assert len(counted) == 2


def test_a_budget_that_is_not_known_yet_is_the_devices() -> None:
    open_budget = recipe()
    closed = open_budget.model_copy(
        update={"memory": open_budget.memory.model_copy(update={"budget": of_name("h100").memory_bytes})}
    )
    found = [Speed(each, MODEL, of_name("h100"), 1).seconds(choice()) for each in (open_budget, closed)]
    assert found[0] == found[1]


def test_no_torch() -> None:
    code = "import sys, bigtrain.planner.speed; raise SystemExit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_sent_is_padded_and_names_its_link() -> None:
    one = speed("h100", 512)
    gather, scatter = one.transfers(choice(1, world_size=512, zero_stage=3))
    assert (gather.link, gather.collective.ranks) == ("network", 512)
    assert gather.collective.calls == 2 * BLOCKS + 1  # what is outside of the blocks stays from forward to backward
    assert scatter.collective.calls == BLOCKS + 1
    exact = 4 * 124e6 * 511 / 512
    assert exact < scatter.collective.sent_bytes < 1.25 * exact  # 768 rows are two for each of 384 ranks
    near, far = one.transfers(choice(1, world_size=512, zero_stage=1, replicate=64))[1:]
    assert (near.link, far.link) == ("NVLink", "network")


def test_one_rank_sends_no_transfers() -> None:
    assert speed().transfers(choice(zero_stage=3)) == []


def test_ranks_copy_what_they_send() -> None:
    """Stage 3 copies parameters out for both passes; stage 1 adds up whole gradients, others this rank's part."""
    alone, several = speed("h100"), speed("h100", 8)
    one = alone.seconds(choice(8))
    stages = [several.seconds(choice(8, world_size=8, zero_stage=stage)) for stage in (1, 2, 3)]
    assert all(8 * each.forward_seconds > one.forward_seconds for each in stages)
    assert stages[2].forward_seconds > stages[0].forward_seconds == stages[1].forward_seconds
    assert stages[2].backward_seconds > stages[1].backward_seconds


def test_sending_that_takes_longer_than_the_work_is_waited_for() -> None:
    one = speed("h100", 512)
    wide = choice(1, world_size=512, zero_stage=3)
    seconds = one.seconds(wide)
    sent = sum(each.seconds for each in one.transfers(wide))
    computed = seconds.forward_seconds + seconds.backward_seconds
    assert sent > computed
    assert seconds.communication_seconds == pytest.approx(sent - computed, rel=0.2)


def test_shared_products_take_less_work_and_a_sum_that_nothing_hides() -> None:
    device = of_name("h100")
    alone = Speed(recipe(), MODEL, device, 8)
    shared = Speed(recipe(sharding={"tensor_parallel": 4}), MODEL, device, 8)
    plain, full = (Choice(8, 8, (policy,) * BLOCKS, 0, 2) for policy in ("none", "full"))
    one, four = (speed.seconds(dataclasses.replace(plain, replicate=8)) for speed in (alone, shared))
    assert one.backward_seconds / 4 < four.backward_seconds < one.backward_seconds / 2  # norms are not shared
    assert four.forward_seconds < one.forward_seconds  # of which the head, which is not shared, is most
    assert four.optimizer_seconds < one.optimizer_seconds
    (sums,) = [sent for sent in shared.transfers(plain) if sent.collective.scope == "tensor"]
    assert (sums.link, sums.collective.calls) == ("NVLink", 8 * 4 * BLOCKS)
    assert four.communication_seconds >= sums.seconds
    (more,) = [sent for sent in shared.transfers(full) if sent.collective.scope == "tensor"]
    assert more.collective.calls == 8 * (4 + 1) * BLOCKS  # dropout would read a block's end again, too
