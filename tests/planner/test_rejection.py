"""Why neighbours lost."""

from __future__ import annotations

from searched import OPEN, budgets, found, opened

from bigtrain.planner.search import search


def test_neighbours_lost_for_a_reason() -> None:
    recipe, model, hardware, ranks = opened(f"memory.budget={budgets()[2]}B")
    best = search(recipe, model, hardware, ranks)
    reasons = {tuple(entry.different): entry.reason for entry in best.rejected}
    assert ("micro_batch_size",) in reasons
    assert ("recompute",) in reasons
    for entry in best.rejected:
        assert set(entry.as_object()) == {"choice", "reason"}
        assert any(words in entry.reason for words in ("over the budget", "slower", "as fast, and"))
        if "slower" in entry.reason:
            assert int(entry.reason.partition("%")[0]) >= 1


def test_nothing_is_rejected_where_nothing_is_open() -> None:
    assert found("train.micro_batch_size=4", "recompute.policy=full").rejected == ()


def test_each_open_key_has_a_neighbour() -> None:
    best = found(*OPEN, "amp.precision=bf16")
    keys = {name for entry in best.rejected for name in entry.different}
    assert {"recompute", "optimizer_state", "master_weights"} <= keys
    assert "accumulation_steps" not in keys
    assert "micro_batch_size" in {name for entry in found().rejected for name in entry.different}


def test_coarser_numbers_lost_with_a_reason() -> None:
    best = found("optimizer.state=auto")
    assert best.choice.optimizer_state == "fp32"
    (coarser,) = (entry for entry in best.rejected if "optimizer_state" in entry.different)
    assert coarser.different == {"optimizer_state": "bf16"}
    assert "slower" in coarser.reason or coarser.reason == "as fast, and less exact"


def test_what_is_over_the_budget_says_by_how_much() -> None:
    best = found(f"memory.budget={budgets()[2]}B")
    over = [entry for entry in best.rejected if "over the budget" in entry.reason]
    assert over
    assert all(entry.reason.split()[1] in ("B", "KiB", "MiB", "GiB") for entry in over)
