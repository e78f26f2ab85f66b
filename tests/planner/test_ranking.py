"""The best choice is the best of all, and preferred for a reason."""

from __future__ import annotations

import pytest
from searched import OPEN, budgets, device_bytes, found, opened

from bigtrain.memory.report import MemoryReport
from bigtrain.planner.candidates import mixes, settings
from bigtrain.planner.hardware import of_name
from bigtrain.planner.offers import Offers, chosen
from bigtrain.planner.ranking import ALIKE, Limits, closest, fastest, mix_spaces
from bigtrain.planner.search import search


@pytest.mark.parametrize("overrides", [(), (*OPEN, "amp.precision=bf16")], ids=["plain", "open"])
@pytest.mark.parametrize("device", ["cpu-laptop", "t4"])
def test_as_fast_as_the_best_of_all(overrides: tuple[str, ...], device: str) -> None:
    if device == "t4":
        overrides = tuple(key for key in overrides if "precision" not in key and "weights" not in key)
    hardware = of_name(device)
    for budget in budgets(*overrides, hardware=hardware)[2 if overrides else 1 : 3]:
        recipe, model, hardware, ranks = opened(*overrides, f"memory.budget={budget}B", hardware=hardware)
        best = search(recipe, model, hardware, ranks)
        offers = Offers(recipe, model, hardware, ranks)
        reserved = best.memory.reserved_bytes_peak
        assert reserved is not None
        every = [
            offers.of(chosen(setting, mix))
            for setting in settings(recipe, hardware, ranks)
            for row in mixes(recipe, model.num_hidden_layers, hardware)
            for mix in row
        ]
        possible = [offer for offer in every if offer.allocated_bytes + device_bytes(best) - reserved <= budget]
        reports = ((offer, offers.report(offer.choice)) for offer in sorted(possible, key=lambda offer: offer.seconds))
        fastest = next(offer.seconds for offer, report in reports if (report.device_bytes_peak or 0) <= budget)
        assert device_bytes(best) <= budget
        # On CUDA what the allocator adds is found for some choices only.
        assert best.seconds.total <= fastest * (1 + ALIKE + (0.04 if hardware.kind == "cuda" else 0))
        assert len(every) == best.searched >= best.priced - len(best.rejected)


def test_plenty_of_memory_needs_no_recomputation_and_rounds_nothing() -> None:
    choice = found().choice
    assert set(choice.recompute) == {"none"}
    assert (choice.optimizer_state, choice.master_weights, choice.gradient_release) == ("fp32", "fp32", False)
    assert (choice.zero_stage, choice.replicate, choice.offload) == (0, 1, "none")


def test_the_closest_is_the_smallest_of_all() -> None:
    offers = Offers(*opened("train.max_grad_norm=null", "optimizer.gradient_release=auto"))
    every = [
        offers.allocated_bytes(setting, mix)
        for setting in settings(offers.recipe, offers.hardware, 1)
        for row in mixes(offers.recipe, offers.model.num_hidden_layers, offers.hardware)
        for mix in row
    ]
    assert offers.of(closest(offers)).allocated_bytes == min(every)


def test_nothing_fits_next_to_nothing() -> None:
    assert fastest(Offers(*opened("memory.budget=1MiB"))) is None


def test_the_host_holds_inputs_of_blocks_last() -> None:
    recipe, *_ = opened()
    assert len(mix_spaces(recipe, 3, of_name("t4"))) == 2
    assert len(mix_spaces(recipe, 3, of_name("cpu-laptop"))) == 1
    (written,) = mix_spaces(
        recipe.model_copy(update={"recompute": found().choice.into(recipe).recompute}), 6, of_name("t4")
    )
    assert len(written) == 1


def whole(report: MemoryReport) -> int:
    assert report.device_bytes_peak is not None
    return report.device_bytes_peak


def test_what_lies_beside_the_allocator_is_out_of_reach_from_the_start() -> None:
    offers = Offers(*opened(hardware=of_name("t4")))
    best = fastest(offers)
    assert best is not None
    beside = whole(best.memory) - (best.memory.reserved_bytes_peak or 0)
    assert best.limits.common == offers.budget_bytes - beside < offers.budget_bytes
    assert best.limits.lessons == 0


def test_limits_learn_what_lies_beside_the_allocator_for_all_and_what_it_adds_for_one() -> None:
    offers = Offers(*opened(hardware=of_name("t4")))
    one, other = settings(offers.recipe, offers.hardware, 1)[:2]
    offer = offers.of(chosen(one, mix_spaces(offers.recipe, 6, offers.hardware)[0][0][0]))
    report = offers.report(offer.choice)
    budget = whole(report) - 2**20
    limits = Limits(budget, budget)
    limits.learn(offer, report)
    assert limits.of(one) == offer.allocated_bytes - 2**20
    assert limits.of(other) == budget - (whole(report) - (report.reserved_bytes_peak or 0)) > limits.of(one)
    for _ in range(5):
        limits.learn(offer, report)
    assert limits.of(other) == limits.of(one)
