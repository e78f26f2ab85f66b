"""A run that goes on is bit by bit the run that was left alone, and on other ranks it has the same state and rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from group import SHARED, free_ports, told_by_all
from matrix import counted
from torch import Tensor
from trained import losses

import bigtrain
from bigtrain.checkpoint.tensors import read_header, read_tensors
from bigtrain.config.schema import Recipe
from bigtrain.data.ensure import ensure_prepared
from bigtrain.data.packing import check_rows
from bigtrain.training.metrics import read_metrics

CUT, STEPS = 7, 27
"""Where a run is cut, in the middle of an epoch, and how long it is: 20 more steps, across the epoch's end."""

EPOCH = "data.validation_fraction=0.5"
"""Which leaves fewer rows for training than those steps read."""

ENGINES = {
    "one": ("sharding.zero_stage=0",),
    "zero-1": ("sharding.zero_stage=1",),
    "zero-3": ("sharding.zero_stage=3",),
}

RowsRead = dict[str, list[str]]
"""The digests of the rows that a rank has read, by step."""


class Case(NamedTuple):
    """A recipe and the folder of its run; `again` is where what was restored is saved at once, if anywhere."""

    recipe: Recipe
    folder: Path
    again: Path | None = None


def recipe_of(tiny: Path, world_size: int, *overrides: str) -> Recipe:
    """Return a recipe with dropout, accumulation and recompute on so many ranks."""
    common = [f"train.micro_batch_size={4 // world_size}", "recompute.policy=full", "train.eval_every=null", EPOCH]
    common += [f"train.steps={STEPS}", f"checkpoint.every_steps={CUT}", "checkpoint.keep=9", "train.dropout=0.1"]
    return bigtrain.load_recipe(tiny, [*common, f"cluster.devices_per_node={world_size}", *overrides])


def trained(cases: list[Case], folder: Path, world_size: int) -> list[list[RowsRead]]:
    """Train runs in a newly started group; return which rows each of its ranks has read, by run and rank."""
    folder.mkdir(exist_ok=True)
    file = folder / "cases.json"
    told = [
        {"recipe": recipe.model_dump(mode="json"), "folder": str(run), "again": again and str(again), "port": port}
        for (recipe, run, again), port in zip(cases, free_ports(len(cases)), strict=True)
    ]
    file.write_text(json.dumps(told))
    by_rank = told_by_all([SHARED / "rank_resume.py", file], world_size)
    return [list(of_run) for of_run in zip(*by_rank, strict=True)]


def is_same(whole: Path, cut: Path) -> bool:
    """Tell whether all losses after the cut, and the last checkpoint's weights, states and counters, are the same."""
    one, other = (losses(read_metrics(run)) for run in (whole, cut))
    after = {step: loss for step, loss in one.items() if step > CUT}
    files = {file.name for file in (whole / f"step-{STEPS:08d}").iterdir()} - {"manifest.json", "plan.yaml"}
    both = [{name: (run / f"step-{STEPS:08d}" / name).read_bytes() for name in files} for run in (whole, cut)]
    return len(after) == STEPS - CUT and after == other and both[0] == both[1]


EVERY_DAY = {
    1: ("bert-one-bf16", "bert-zero-3-fp32", "gpt-one-fp32", "gpt-zero-1-bf16"),
    2: ("bert-zero-1-fp32", "bert-zero-3-bf16", "gpt-one-bf16", "gpt-zero-3-fp32"),
}
"""By ranks: each family, engine and precision with most of the others; the nightly tier has all."""


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("tier", ["ci", pytest.param("nightly", marks=pytest.mark.nightly)])
def test_a_run_that_was_cut_goes_on_bit_by_bit(
    tiny_recipes: dict[str, Path], tmp_path: Path, tier: str, world_size: int
) -> None:
    recipes = {
        f"{family}-{engine}-{precision}": recipe_of(
            tiny_recipes[family], world_size, *ENGINES[engine], f"amp.precision={precision}"
        )
        for family, engine, precision in product(tiny_recipes, ENGINES, ("fp32", "bf16"))
    }
    for family in tiny_recipes:
        recipe = recipes[f"{family}-one-fp32"]
        assert CUT * 8 < check_rows(recipe, ensure_prepared(recipe)) < STEPS * 8
    chosen = recipes if tier == "nightly" else {name: recipes[name] for name in EVERY_DAY[world_size]}
    with counted("R1", tier, f"world-{world_size}") as counts:
        for name, same in gone_on_with(chosen, tmp_path, world_size):
            counts.add(same, f"{name} on {world_size}")


def gone_on_with(recipes: dict[str, Recipe], folder: Path, world_size: int) -> Iterator[tuple[str, bool]]:
    """Train runs whole, and their copies from the cut on in new processes; yield each and whether both are the same."""
    whole, cut = folder / "whole", folder / "cut"
    read = trained([Case(recipe, whole / name) for name, recipe in recipes.items()], whole, world_size)
    for name in recipes:
        shutil.copytree(whole / name / f"step-{CUT:08d}", cut / name / f"step-{CUT:08d}")
        shutil.copyfile(whole / name / "plan.yaml", cut / name / "plan.yaml")
    again = trained([Case(recipe, cut / name) for name, recipe in recipes.items()], cut, world_size)
    for name, before, after in zip(recipes, read, again, strict=True):
        rows = [{step: found for step, found in rank.items() if int(step) >= CUT} for rank in before]
        same_rows = rows == after and all(len(rank) == STEPS - CUT for rank in rows)
        yield name, same_rows and is_same(whole / name, cut / name)


PHASES = ((4, 3, "full"), (2, 1, "none"), (1, 0, "selective"), (4, 3, "none"), (3, 2, "full"))
"""Ranks, ZeRO stages and recompute policies, in turn."""

EACH = 20
"""Steps on as many ranks."""


@pytest.mark.slow
def test_a_run_goes_from_ranks_to_ranks_and_learns_the_same(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    common = ["train.global_batch_size=12", "train.dropout=0", "train.eval_every=null", "checkpoint.keep=9"]
    common += ["optimizer.schedule=constant", "optimizer.warmup_steps=10", "optimizer.learning_rate=1e-3"]
    common += [f"checkpoint.every_steps={EACH}"]
    cases, run, whole = [], tmp_path / "run", tmp_path / "whole"
    for number, (size, stage, policy) in enumerate(PHASES, 1):
        places = [f"cluster.devices_per_node={size}", f"sharding.zero_stage={stage}", f"recompute.policy={policy}"]
        places += [f"train.micro_batch_size={12 // size}", f"train.steps={EACH * number}"]
        again = None if number == 1 else tmp_path / f"again-{number}"
        cases.append(Case(bigtrain.load_recipe(tiny_recipes["bert"], [*common, *places]), run, again))
    alone = [*common, "train.micro_batch_size=12", f"train.steps={EACH * len(PHASES)}", "sharding.zero_stage=0"]
    cases.append(Case(bigtrain.load_recipe(tiny_recipes["bert"], alone), whole))
    ensure_prepared(cases[0].recipe)
    with counted("R2", "ci") as counts:
        *parts, of_whole = trained(cases, tmp_path, 4)
        for number, case in enumerate(cases[1:-1], 1):
            assert case.again is not None
            folder = f"step-{EACH * number:08d}"
            counts.add(differing_bytes(run / folder, case.again / folder) == 0, f"bits of load {number}")
        counts.add(rows_by_step(parts) == rows_by_step([of_whole]), "the rows of each step")
        expected, found = (losses(read_metrics(folder)) for folder in (whole, run))
        assert list(found) == list(expected) == list(range(1, EACH * len(PHASES) + 1))
        furthest = max(abs(found[step] / expected[step] - 1) for step in expected)
        counts.add(furthest <= 1e-5, f"losses {furthest:.1e} apart")
        counts.longest("relative distance of losses", furthest)
        counts.longest("steps", len(expected))


def rows_by_step(runs: list[list[RowsRead]]) -> dict[str, list[str]]:
    """Return the rows of each global batch, those of the first rank first."""
    found: dict[str, list[str]] = {}
    for ranks in runs:
        for step in ranks[0]:
            found[step] = [row for rank in ranks if step in rank for row in rank[step]]
    return found


def differing_bytes(one: Path, other: Path) -> int:
    """Count the bytes in which two checkpoints of the same tensors and counters differ, whatever ranks wrote them."""
    left, right = assembled(one), assembled(other)
    assert json.loads((one / "state.json").read_text()) == json.loads((other / "state.json").read_text())
    assert left.keys() == right.keys()
    pairs = ((left[name].view(-1).view(torch.uint8), right[name].view(-1).view(torch.uint8)) for name in left)
    return sum(int((a ^ b).count_nonzero()) for a, b in pairs)


def assembled(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, whole, put together from its files by hand."""
    whole: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        for name, tensor in read_tensors(path):
            part = header[name].part
            key = f"{path.name.split('.')[0].split('-')[0]} {name}"
            if part is None:
                whole[key] = tensor
                continue
            kept = whole.setdefault(key, torch.zeros(part.whole, dtype=tensor.dtype))
            before = 0
            for box in part.boxes:
                count = int(torch.tensor(box.shape).prod())
                place = tuple(slice(first, first + size) for first, size in zip(box.start, box.shape, strict=True))
                kept[place] = tensor.reshape(-1)[before : before + count].view(box.shape)
                before += count
    return whole
