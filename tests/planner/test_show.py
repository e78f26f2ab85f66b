"""A plan as lines for a terminal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import bigtrain
from bigtrain.memory.report import MemoryReport
from bigtrain.planner import hardware
from bigtrain.planner.choice import Choice
from bigtrain.planner.hardware import Hardware, of_name
from bigtrain.planner.links import Transfer
from bigtrain.planner.plan import plan
from bigtrain.planner.rejection import Rejected
from bigtrain.planner.show import memory_parts, plan_lines
from bigtrain.planner.speed import StepSeconds
from bigtrain.sharding.cost import Collective

GIB = 2**30
GPU = of_name("a100-80gb")
SMALL = ["train.steps=100", "train.global_batch_size=8", "data.sequence_length=128", "optimizer.warmup_steps=10%"]


def lines_of(*overrides: str, on: Hardware | None = None) -> str:
    return "\n".join(plan_lines(plan(bigtrain.load_recipe("bert_large", list(overrides)), on or hardware.cpu())))


def planned(**keys: Any) -> Any:
    """Return what looks like a plan of a recipe of 100 steps, its predictions made up."""
    real = plan(bigtrain.load_recipe("bert_large", SMALL), GPU)
    made_up = {
        "recipe": real.recipe,
        "model": real.model,
        "hardware": GPU,
        "parameters": real.parameters,
        "flops_per_token": real.flops_per_token,
        "total_steps": 100,
        "world_size": 1,
        "choice": Choice(8, 1, ("none",) * 24),
        "memory": MemoryReport({"weights": GIB, "activations": 2 * GIB, "logits": 0}, 4 * GIB, 5 * GIB, GIB),
        "seconds": StepSeconds(0.3, 0.6, 0.0, 0.1),
        "tokens_per_second": 1024.0,
        "mfu": 0.412,
        "rejected": (),
        "warnings": (),
        "budget_bytes": 20 * GIB,
        "rates_source": "the table of devices",
        "transfers": (),
    }
    return SimpleNamespace(**{**made_up, **keys})


def text_of(**keys: Any) -> str:
    return "\n".join(plan_lines(planned(**keys)))


def line_of(start: str, **keys: Any) -> str:
    return next(line for line in text_of(**keys).splitlines() if line.strip().startswith(start))


def test_it_says_what_is_trained() -> None:
    text = text_of()
    assert text.startswith("bert_large: bert, 24 layers x 1024, vocabulary 30,522: 335,")
    assert "batch        8 rows x 128 tokens" in text
    assert "100 steps, about 102K tokens" in text
    assert "device       a100-80gb" in text
    assert " per token, forward and backward, in bf16" in text


def test_several_ranks_are_counted() -> None:
    text = text_of(world_size=16, choice=Choice(8, 1, ("none",) * 24, zero_stage=2))
    assert "16 x a100-80gb" in text
    assert "ZeRO stage 2 over 16 ranks" in text
    assert "of a rank at the peak" in text


def test_epochs_are_shown_as_such() -> None:
    assert "1.5 epochs" in lines_of("train.epochs=1.5")
    assert "the whole run" not in text_of(total_steps=None, recipe=epochs())


def epochs() -> Any:
    return plan(bigtrain.load_recipe("bert_large", ["train.epochs=1.5"]), GPU).recipe


def test_the_choice_is_in_words() -> None:
    text = text_of()
    assert "choice       micro-batches of 8, one to a step\n             recompute none\n" in text


def test_speed_is_of_a_step_and_of_the_run() -> None:
    text = text_of()
    assert "speed        1 s a step: 1,024 tokens/s, MFU 41.2% (predicted)" in text
    assert "forward 30%, backward 60%, optimizer 10%" in text
    assert "the whole run takes 1m40s" in text
    assert "rates: the table of devices" in text


def test_parts_that_take_no_time_are_not_said() -> None:
    assert "forward 30%, backward 70%\n" in text_of(seconds=StepSeconds(0.3, 0.699, 0.0, 0.001))


def test_what_hides_nothing_is_said() -> None:
    assert "communication 20%, offload 20%" in text_of(seconds=StepSeconds(0.2, 0.2, 0.1, 0.1, 0.2, 0.2))


def test_what_is_sent_over_which_link_and_how_long_nothing_hides_it() -> None:
    gather = Collective("all_gather", 2**30, 8, "shard", 2, 50, 0.5)
    transfers = (Transfer(gather, "NVLink", 0.001), Transfer(gather, "network", 0.002))
    lines = text_of(world_size=64, transfers=transfers, seconds=StepSeconds(0.3, 0.5, 0.0, 0.1, 0.1)).splitlines()
    place = lines.index("sent         NVLink: all-gather 1.00 GiB over 8 ranks: 50 ms")
    assert lines[place + 1].strip() == "network: all-gather 1.00 GiB over 8 ranks: 100 ms"
    assert lines[place + 2].strip() == "together 150 ms a step, of which 100 ms hide behind nothing"
    assert "sent" not in text_of()


def test_several_ranks_have_a_rate_each() -> None:
    assert ": 1,024 tokens/s, 64 of a rank, MFU" in text_of(world_size=16)
    assert "of a rank, MFU" not in text_of()


def test_memory_is_of_the_device() -> None:
    text = text_of()
    assert "memory       5.00 GiB at the peak, 25% of 20.00 GiB (predicted)" in text
    assert "░" * 24 in text
    assert memory_parts(planned()) == {"weights": GIB, "activations": 2 * GIB, "fragmentation": GIB, "context": GIB}


def test_bars_are_shares_of_the_peak() -> None:
    weights, activations = line_of("weights"), line_of("activations")
    assert activations.count("█") == 12
    assert 6 <= weights.count("█") <= 7


def test_causes_that_hold_nothing_have_no_line() -> None:
    assert "logits" not in text_of()


def test_on_a_cpu_the_rest_is_the_process() -> None:
    report = MemoryReport({"weights": GIB}, GIB, 3 * GIB, 3 * GIB)
    parts = memory_parts(planned(memory=report, hardware=hardware.cpu()))
    assert parts == {"weights": GIB, "process": 2 * GIB}


def test_what_is_not_known_is_left_out() -> None:
    assert memory_parts(planned(memory=MemoryReport({"weights": GIB}))) == {"weights": GIB}


def test_why_others_lost() -> None:
    lost = (
        Rejected({"micro_batch_size": 16}, "3.20 GiB over the budget"),
        Rejected({"recompute": "full"}, "24% slower"),
    )
    lines = text_of(rejected=lost).splitlines()
    assert "not chosen   micro_batch_size=16: 3.20 GiB over the budget" in lines
    assert "             recompute=full: 24% slower" in lines


@pytest.mark.parametrize("warnings", [(), ("one",), ("one", "two")])
def test_warnings_come_last(warnings: tuple[str, ...]) -> None:
    lines = text_of(warnings=warnings).splitlines()
    assert [line[13:] for line in lines[len(lines) - len(warnings) :]] == list(warnings)
    assert any(line.startswith("warning") for line in lines) is bool(warnings)


def test_a_real_plan_can_be_shown() -> None:
    text = lines_of(*SMALL)
    for cause in ("weights", "gradients", "optimizer_state"):
        assert cause in text
    lean = lines_of(
        *SMALL, "amp.precision=bf16", "amp.master_weights=split24", "optimizer.state=8bit", "train.max_grad_norm=null",
        "optimizer.gradient_release=true", "train.micro_batch_size=8",
    )  # fmt: skip
    assert "master_weights" in lean
    assert "optimizer states in 8bit, master weights split24, gradients released" in lean


def test_a_warning_of_a_real_plan_has_its_line() -> None:
    text = lines_of(*SMALL, "amp.precision=bf16", "amp.master_weights=none", "optimizer.learning_rate=1e-6")
    assert "a learning rate of 1e-06 is too small for bf16 weights" in text
