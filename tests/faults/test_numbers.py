"""Numbers that go wrong: not finite, a spike of the loss, a flipped bit of one replica."""

from __future__ import annotations

import json
import signal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from group import told_by_all
from matrix import Counts, counted
from rank_trains import train_all
from spiking import WINDOW, Rows, order_of
from trained import RELEASED, losses, train

import bigtrain
from bigtrain import fault_points
from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.finite import first_not_finite
from bigtrain.checkpoint.tensors import read_tensors
from bigtrain.config.schema import Recipe
from bigtrain.engine import Engine
from bigtrain.errors import Interrupted, NonFiniteGradient
from bigtrain.training.metrics import read_metrics

SHARED = Path(__file__).parent.parent / "shared"

SHORT = ("train.steps=4", "train.eval_every=null", "checkpoint.every_steps=1", "checkpoint.keep=9")
BROKEN = 2
"""Steps taken before the one that goes wrong; a save follows each."""

POINTS, NUMBERS, FAMILIES = ("loss", "gradient"), ("nan", "inf"), ("bert", "gpt")


def digests(folder: Path, step: int) -> dict[str, str]:
    """Return those of the weights and states in a checkpoint."""
    files = manifest.read(folder / manifest.folder_name(step))["files"]
    return {name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")}


def not_finite(folder: Path) -> list[str]:
    """Return what is not finite in any checkpoint of a run."""
    files = [file for step in manifest.step_folders(folder) for file in sorted(step.glob("*.safetensors"))]
    assert files
    return [f"{file}: {name}" for file in files if (name := first_not_finite(read_tensors(file)))]


def left_out(folder: Path, point: str, number: str) -> bool:
    """Tell whether one step of a run changed nothing, was logged as it was, and everything saved is finite."""
    rows = {row["step"]: row for row in read_metrics(folder) if "loss" in row}
    told = rows[BROKEN + 1]["loss"] == number if point == "loss" else isinstance(rows[BROKEN + 1]["loss"], float)
    skipped = [rows[step]["skipped"] for step in sorted(rows)]
    same = digests(folder, BROKEN) == digests(folder, BROKEN + 1)
    changed = digests(folder, BROKEN + 1) != digests(folder, BROKEN + 2)
    return told and skipped == [0, 0, 1, 1] and same and changed and not not_finite(folder)


def on_one_process(recipes: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch, counts: Counts) -> None:
    for family, point, number in product(FAMILIES, POINTS, NUMBERS):
        name = f"one-{family}-{point}-{number}"
        monkeypatch.setattr(fault_points, "_ASKED", fault_points.parse(f"{point}:change={number}:step={BROKEN}"))
        train(recipes[family], folder / name, *SHORT)
        counts.add(left_out(folder / name, point, number), name)


def with_release(recipes: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch, counts: Counts) -> None:
    """A loss that is not finite is found before the first update, a gradient not, which ends the run."""
    for family, number in product(FAMILIES, NUMBERS):
        name = f"release-{family}-loss-{number}"
        monkeypatch.setattr(fault_points, "_ASKED", fault_points.parse(f"loss:change={number}:step={BROKEN}"))
        train(recipes[family], folder / name, *SHORT, *RELEASED)
        counts.add(left_out(folder / name, "loss", number), name)
        name = f"release-{family}-gradient-{number}"
        monkeypatch.setattr(fault_points, "_ASKED", fault_points.parse(f"gradient:change={number}:step={BROKEN}"))
        with pytest.raises(NonFiniteGradient, match="step-00000002$"):
            train(recipes[family], folder / name, *SHORT, *RELEASED)
        steps = [manifest.step_of(step) for step in manifest.step_folders(folder / name)]
        counts.add(steps == [2, 1] and not not_finite(folder / name), name)


@pytest.mark.slow
def test_not_finite_on_one_process(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted("N1", "ci", "one-process") as counts:
        on_one_process(tiny_recipes, tmp_path, monkeypatch, counts)
        with_release(tiny_recipes, tmp_path, monkeypatch, counts)


STAGES = {"zero-0": "0", "zero-2": "2", "zero-3": "3"}
CASES = [*product(STAGES, FAMILIES, POINTS, NUMBERS)]


@pytest.mark.parametrize(
    "tier", [pytest.param("ci", marks=pytest.mark.slow), pytest.param("nightly", marks=pytest.mark.nightly)]
)
def test_not_finite_on_one_of_two_ranks(tiny_recipes: dict[str, Path], tmp_path: Path, tier: str) -> None:
    """In CI each stage, family and point, with one of the numbers each; at night all, in bf16 too."""
    precisions = ("fp32",) if tier == "ci" else ("fp32", "bf16")
    chosen = [(precision, *case) for precision in precisions for case in CASES]
    if tier == "ci":
        chosen = [case for case in chosen if (case[2] == "bert") == ((case[3] == "loss") == (case[4] == "nan"))]
    runs = {"-".join(case): case for case in chosen}
    cases: list[dict[str, Any]] = []
    for name, (precision, stage, family, point, number) in runs.items():
        overrides = [*SHORT, "train.micro_batch_size=2", "cluster.devices_per_node=2", f"amp.precision={precision}"]
        overrides.append(f"sharding.zero_stage={STAGES[stage]}")
        faults = f"{point}:change={number}:step={BROKEN}:rank=1"
        cases.append(
            {
                "recipe": str(tiny_recipes[family]),
                "overrides": overrides,
                "folder": str(tmp_path / name),
                "faults": faults,
            }
        )
    with counted("N1", tier, "two-ranks") as counts:
        told = train_all(cases, 2, tmp_path)
        for place, (name, (_, _, _, point, number)) in enumerate(runs.items()):
            ended = [rank[place]["ended"] for rank in told]
            counts.add(ended == [None, None] and left_out(tmp_path / name, point, number), f"{name}: {ended}")


BAD = 8
"""The global batch whose loss is a spike, counted from 0: met in step 9, gone back to step 5, so 4 batches are left."""


def interrupted(call: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the run end in its `call`th step from now on, by a signal, after which it saves, or at once."""
    plain, calls = Engine.step, []

    def step(engine: Engine, max_norm: float | None = 1.0) -> Any:
        calls.append(engine.steps_taken)
        if len(calls) == call and how == "signal":
            signal.raise_signal(signal.SIGTERM)
        if len(calls) == call and how == "killed":
            raise KeyboardInterrupt
        return plain(engine, max_norm)

    monkeypatch.setattr(Engine, "step", step)


def outcome(folder: Path) -> tuple[Any, ...]:
    """Return the losses of a run, its spikes, and the digests and the place in the data of its end."""
    rows = read_metrics(folder)
    state = json.loads((folder / "step-00000012" / "state.json").read_text())
    return losses(rows), [row for row in rows if "spike_loss" in row], digests(folder, 12), state["loader"]["row"]


@pytest.mark.parametrize(
    "tier", [pytest.param("ci", marks=pytest.mark.slow), pytest.param("nightly", marks=pytest.mark.nightly)]
)
def test_a_spike_replays_bit_by_bit(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    """A run goes back and leaves rows out; interrupted anywhere and gone on with, it ends as it does without."""
    path = tiny_recipes["gpt"]
    path.write_text(path.read_text().replace("eval_every: 6", "eval_every: null"))
    rows = Rows(monkeypatch)
    order = order_of(bigtrain.plan(bigtrain.load_recipe(path)), 16)
    rows.bad = {order[BAD]}
    places = [(7, "signal"), (7, "killed"), (10, "signal"), (11, "killed")]
    if tier == "nightly":
        places = [(call, how) for call in range(2, 16) for how in ("signal", "killed")]
    with counted("N2", tier, "replay") as counts:
        for policy, read in (("rollback", order), ("skip", order[:12])):
            rows.seen.clear()
            whole = tmp_path / f"{policy}-whole"
            train(path, whole, f"train.on_spike={policy}")
            counts.add(rows.read == read, f"{policy}: other rows")
            for call, how in places if policy == "rollback" else places[1:2]:
                folder = tmp_path / f"{policy}-{call}-{how}"
                interrupted(call, how, monkeypatch)
                with pytest.raises((Interrupted, KeyboardInterrupt)):
                    train(path, folder, f"train.on_spike={policy}")
                interrupted(0, "", monkeypatch)
                train(path, folder, f"train.on_spike={policy}")
                counts.add(outcome(folder) == outcome(whole), folder.name)


@pytest.mark.slow
def test_a_spike_on_two_ranks(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    """All decide alike, whichever of them has the rows that spike."""
    cases = []
    for stage, policy in (("0", "rollback"), ("3", "stop"), ("3", "skip"), ("3", "rollback")):
        folder = tmp_path / f"{policy}-{stage}"
        common = ["cluster.devices_per_node=2", "train.micro_batch_size=2", "train.eval_every=null", "train.steps=11"]
        overrides = [*common, f"sharding.zero_stage={stage}", f"train.on_spike={policy}"]
        faults = f"loss:change=30:step={BAD}:rank=1:once={folder}-once"
        cases.append(
            {
                "recipe": str(tiny_recipes["gpt"]),
                "overrides": overrides,
                "folder": str(folder),
                "faults": faults,
                "window": WINDOW,
            }
        )
    with counted("N2", "ci", "two-ranks") as counts:
        for case, *ended in zip(cases, *train_all(cases, 2, tmp_path), strict=True):
            folder = Path(case["folder"])
            policy, texts = folder.name.partition("-")[0], [rank["ended"] for rank in ended]
            rows = read_metrics(folder)
            spikes = [row for row in rows if "spike_loss" in row]
            if policy == "stop":
                fine = texts[0] == texts[1] and texts[0].startswith("step 9: ") and texts[0].endswith("step-00000005")
                fine = fine and [manifest.step_of(step) for step in manifest.step_folders(folder)] == [5]
            elif policy == "skip":
                fine = texts == [None, None] and rows[-1]["skipped"] == 1 and [row["step"] for row in spikes] == [9]
            else:
                fine = texts == [None, None] and [row["left_out_to"] for row in spikes] == [9 * 8 - 1]
                fine = fine and list(losses(rows)) == list(range(1, 12))
            counts.add(fine, f"{folder.name}: {texts}")


FLIPS, INTERVAL = 100, 2


@pytest.mark.slow
def test_a_flipped_bit_is_found_and_the_rank_named(tmp_path: Path) -> None:
    """Of four replicas the majority tells, of two the rank itself, where it is between a check and the next update."""
    common = {
        "name": "flipped",
        "model": {"family": "gpt", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "data": {"sequence_length": 16},
        "train": {"objective": "clm", "steps": 4, "global_batch_size": 16, "device": "cpu", "compile": False},
        "optimizer": {"learning_rate": 1e-2},
        "recompute": {"policy": "none"},
    }
    common["model"] |= {"vocab_size": 90}  # type: ignore[index,operator]
    common["train"] |= {"micro_batch_size": 4, "max_grad_norm": 1.0}  # type: ignore[operator]
    layouts = {"four": (0, 4, FLIPS), "two": (3, 2, 20), "none": (3, 1, 0)}
    cases: list[Any] = []
    for stage, replicate, flips in layouts.values():
        sharding = {"engine": "fsdp2", "zero_stage": stage, "replicate": replicate, "offload": "none"}
        recipe = Recipe.model_validate({**common, "sharding": sharding, "cluster": {"devices_per_node": 4}})
        cases.append([recipe.model_dump(mode="json"), flips, INTERVAL])
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    with counted("N3", "ci") as counts:
        ranks = told_by_all([SHARED / "rank_replicas.py", tmp_path / "cases.json"], 4)
        for rank in ranks:
            assert rank[0]["flips"] == ranks[0][0]["flips"], "ranks say different things"
        four, two, none = ranks[0]
        for flip in (flip for flip in four["flips"] if not flip["undone"]):
            error = flip["error"] or ""
            named = f": rank {flip['rank']} on " in error and " against ranks " in error
            counts.add(named and f": {flip['parameter']}" in error, f"four: {flip}")
        for flip in (flip for flip in two["flips"] if not flip["undone"]):
            pair = {flip["rank"], flip["rank"] ^ 2}
            itself = (flip["error"] or "").startswith(f"rank {flip['rank']} on ")
            both = all(f"rank {rank} on " in (flip["error"] or "") for rank in pair)
            counts.add(itself if flip["when"] == 0 else both, f"two: {flip}")
        assert "none to compare" in none["said"][0]
        counts.longest("bits undone by rounding, not counted", sum(flip["undone"] for flip in four["flips"]))
        clean = [case["clean"] for case in ranks[0]]
        counts.add(not any(case["alarms"] for case in clean), f"false alarms: {clean}")
        counts.longest("clean checks", sum(case["checks"] for case in clean))
        share = clean[0]["check"] / (100 * clean[0]["step"])
        counts.longest("share of the time at the default interval of 100 steps", round(share, 5))
        counts.add(share < 0.01, f"overhead {share:.2%}")


@pytest.mark.slow
def test_no_checkpoint_holds_a_flipped_bit(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    """In a run: flipped on one of three replicas, right before a save that is not on a check's interval."""
    overrides = ["train.global_batch_size=9", "train.micro_batch_size=3", "cluster.devices_per_node=3"]
    overrides += ["sharding.zero_stage=0", "train.eval_every=null", "checkpoint.every_steps=3"]
    case = {
        "recipe": str(tiny_recipes["bert"]),
        "overrides": overrides,
        "folder": str(tmp_path / "run"),
        "faults": "weights:change=1234:rank=2:step=6",
    }
    with counted("N3", "ci", "run") as counts:
        texts = [rank[0]["ended"] for rank in train_all([case], 3, tmp_path)]
        counts.add(len(set(texts)) == 1 and texts[0].startswith("step 6: "), str(texts))
        counts.add(": rank 2 on " in texts[0] and "was alike on its ranks at step 3" in texts[0], texts[0])
        counts.add(texts[0].endswith("step-00000003"), texts[0])
        counts.add([manifest.step_of(step) for step in manifest.step_folders(tmp_path / "run")] == [3], "saved")
