"""A plan as lines for a terminal."""

from __future__ import annotations

import bigtrain
from bigtrain.planner import hardware
from bigtrain.planner.plan import plan
from bigtrain.planner.show import plan_lines


def lines_of(*overrides: str) -> str:
    return "\n".join(plan_lines(plan(bigtrain.load_recipe("bert_large", list(overrides)), hardware.cpu())))


def test_it_says_what_is_trained_and_what_it_holds() -> None:
    text = lines_of("train.steps=100", "train.global_batch_size=8", "data.sequence_length=128")
    assert "24 layers x 1024" in text
    assert "335," in text
    assert "100 steps, about 102K tokens" in text
    assert "8 rows x 128 tokens: 1 micro-batches of 8" in text
    for cause in ("weights", "gradients", "optimizer_state"):
        assert cause in text
    assert "model state  4.99 GiB" in text


def test_epochs_are_shown_as_such() -> None:
    assert "1.5 epochs" in lines_of("train.epochs=1.5")


def test_causes_that_hold_nothing_have_no_line() -> None:
    causes = {line.split()[0] for line in lines_of().splitlines() if line.startswith("  ")}
    assert causes == {"weights", "gradients", "optimizer_state"}
    lean = lines_of(
        "amp.precision=bf16", "amp.master_weights=split24", "optimizer.state=8bit", "optimizer.gradient_release=true",
        "train.max_grad_norm=null", "train.global_batch_size=8", "train.micro_batch_size=8",
    )  # fmt: skip
    causes = {line.split()[0] for line in lean.splitlines() if line.startswith("  ")}
    assert causes == {"weights", "master_weights", "optimizer_state"}
    assert "in bf16" in lean


def test_a_warning_has_its_line() -> None:
    lines = lines_of("amp.precision=bf16", "amp.master_weights=none", "optimizer.learning_rate=1e-6").splitlines()
    (line,) = [line for line in lines if line.startswith("warning") and "master_weights" in line]
    assert line.startswith("warning      a learning rate of 1e-06 is too small for bf16 weights")
