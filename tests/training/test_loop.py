"""The loop: the same twice, resumed bitwise, complete run folders, nothing left behind by bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import RELEASED, losses, train

import bigtrain
from bigtrain.checkpoint.state import OPTIMIZER, WEIGHTS, load_weights
from bigtrain.checkpoint.tensors import read_header, read_tensors
from bigtrain.engine import Engine
from bigtrain.errors import CheckpointError, DataError, ResumeError
from bigtrain.training import loop
from bigtrain.training.build import build_plan_model
from bigtrain.training.metrics import read_metrics

LEAN = ("amp.precision=bf16", "amp.master_weights=split24", "optimizer.state=8bit", *RELEASED)
CONSTANT = ("optimizer.schedule=constant", "optimizer.warmup_steps=2")
"""A learning rate that does not depend on the length of the run."""
WAYS = {
    "adamw": (),
    "lamb": ("optimizer.name=lamb",),
    "lean": LEAN,
    "coarse": ("amp.precision=bf16", "amp.master_weights=none", "optimizer.name=lamb", "optimizer.state=4bit"),
    "muon": ("optimizer.name=muon", "optimizer.state=bf16", "recompute.policy=full"),
    "adafactor": ("optimizer.name=adafactor", "amp.precision=bf16", "amp.master_weights=split24"),
}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    plan = bigtrain.plan(bigtrain.load_recipe(folder / "plan.yaml"))
    model = build_plan_model(plan)
    load_weights(model, folder)
    return dict(model.state_dict())


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_it_learns_and_writes_a_complete_run_folder(tiny_recipes: dict[str, Path], tmp_path: Path, family: str) -> None:
    run = tmp_path / "run"
    rows = train(tiny_recipes[family], run, "train.steps=40")
    found = losses(rows)
    assert list(found) == list(range(1, 41))
    assert found[40] < found[1] - 0.5
    assert {"plan.yaml", "env.json", "metrics.jsonl", "report.html", "step-00000040"} <= {f.name for f in run.iterdir()}
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [6, 12, 18, 24, 30, 36, 40]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert evaluations[-1]["eval_perplexity"] == pytest.approx(2.718281828 ** evaluations[-1]["eval_loss"], rel=1e-6)
    assert json.loads((run / "env.json").read_text())["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_the_same_recipe_twice_is_bitwise_the_same_another_seed_is_not(
    tiny_recipes: dict[str, Path], tmp_path: Path, family: str
) -> None:
    one, other = (losses(train(tiny_recipes[family], tmp_path / name)) for name in "ab")
    assert one == other
    assert same_weights(tmp_path / "a" / "step-00000012", tmp_path / "b" / "step-00000012")
    assert losses(train(tiny_recipes[family], tmp_path / "c", "seed=7"))[2] != one[2]


@pytest.mark.parametrize(
    ("family", "way"), [("bert", way) for way in WAYS] + [("gpt", way) for way in ("adamw", "lamb", "lean")]
)
def test_a_run_that_is_cut_goes_on_bitwise(
    tiny_recipes: dict[str, Path], tmp_path: Path, family: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = WAYS[way]
    whole = train(tiny_recipes[family], tmp_path / "whole", *overrides)
    steps = 0
    plain = Engine.step

    def cut(engine: Engine, max_norm: float | None = 1.0) -> Any:
        nonlocal steps
        steps += 1
        if steps == 9:
            raise KeyboardInterrupt
        return plain(engine, max_norm)

    monkeypatch.setattr(Engine, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipes[family], tmp_path / "cut", *overrides)
    monkeypatch.undo()
    assert losses(train(tiny_recipes[family], tmp_path / "cut", *overrides)) == losses(whole)
    for name in (WEIGHTS, OPTIMIZER):
        one, other = (tmp_path / run / "step-00000012" / name for run in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes()


def test_a_lean_checkpoint_holds_seven_bytes_a_parameter_and_less(
    tiny_recipes: dict[str, Path], tmp_path: Path
) -> None:
    train(tiny_recipes["bert"], tmp_path / "run", *LEAN, "train.steps=1")
    folder = tmp_path / "run" / "step-00000001"
    stored = read_header(folder / WEIGHTS)
    assert {entry.dtype for entry in stored.values()} == {torch.bfloat16}
    keys = {name.rpartition(".")[2] for name in read_header(folder / OPTIMIZER)}
    assert "remainder" in keys
    held = {name: tensor for name, tensor in read_tensors(folder / OPTIMIZER) if name.endswith(".remainder")}
    assert all(tensor.element_size() == 1 for tensor in held.values())
    assert any(tensor.any() for tensor in held.values())
    assert held.keys() == {f"{name}.remainder" for name in stored}


@pytest.mark.parametrize("policy", ["full", "selective", "[none, full]"])
def test_a_run_goes_on_with_another_recompute_bitwise(
    tiny_recipes: dict[str, Path], tmp_path: Path, policy: str
) -> None:
    whole = losses(train(tiny_recipes["bert"], tmp_path / "whole"))
    train(tiny_recipes["bert"], tmp_path / "run", "train.steps=5", "recompute.policy=none", *CONSTANT)
    rows = train(tiny_recipes["bert"], tmp_path / "run", f"recompute.policy={policy}", *CONSTANT)
    assert losses(rows) == losses(train(tiny_recipes["bert"], tmp_path / "constant", *CONSTANT))
    assert losses(rows) != whole


def test_a_finished_run_says_so(
    tiny_recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = train(tiny_recipes["gpt"], tmp_path / "run", "train.steps=3")
    capsys.readouterr()
    (tmp_path / "run" / "report.html").unlink()
    assert train(tiny_recipes["gpt"], tmp_path / "run", "train.steps=3") == rows
    assert (tmp_path / "run" / "report.html").is_file()
    assert "3 steps are done already" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_passed_over(
    tiny_recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    rows = train(tiny_recipes["gpt"], run)
    weights = run / "step-00000012" / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    assert losses(train(tiny_recipes["gpt"], run)) == losses(rows)
    assert "step-00000012" in capsys.readouterr().err


def test_new_weights_come_from_another_run(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_recipes["gpt"], tmp_path / "first")
    still = ["train.steps=1", "optimizer.learning_rate=0"]
    for number, source in enumerate((tmp_path / "first", tmp_path / "first" / "step-00000012")):
        run = tmp_path / f"next-{number}"
        train(tiny_recipes["gpt"], run, f"train.init_from={source}", *still)
        assert same_weights(run / "step-00000001", tmp_path / "first" / "step-00000012")
    train(tiny_recipes["gpt"], tmp_path / "fresh", *still)
    assert not same_weights(tmp_path / "fresh" / "step-00000001", tmp_path / "first" / "step-00000012")


def test_weights_of_another_shape_are_refused_before_a_folder_is_made(
    tiny_recipes: dict[str, Path], tmp_path: Path
) -> None:
    train(tiny_recipes["gpt"], tmp_path / "first", "train.steps=1")
    with pytest.raises(CheckpointError, match="weights of another model: "):
        train(tiny_recipes["gpt"], tmp_path / "next", f"train.init_from={tmp_path / 'first'}", "model.hidden_size=64")
    assert not (tmp_path / "next").exists()


def test_weights_that_know_other_tokens_are_refused(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_recipes["gpt"], tmp_path / "first", "train.steps=1")
    texts = tmp_path / "texts.txt"
    texts.write_text("a wholly different thing is written here today\n\n" * 90)
    from_first = [f"train.init_from={tmp_path / 'first'}", f"data.source={texts}", "train.steps=1"]
    with pytest.raises(
        CheckpointError, match=r"^command line: train.init_from: .* with another tokenizer; use data.tok"
    ):
        train(tiny_recipes["gpt"], tmp_path / "next", *from_first)
    own = tmp_path / "first" / "step-00000001" / "tokenizer.json"
    assert train(tiny_recipes["gpt"], tmp_path / "next", *from_first, f"data.tokenizer={own}")


def test_a_folder_of_another_recipe_is_refused_by_the_library_too(
    tiny_recipes: dict[str, Path], tmp_path: Path
) -> None:
    train(tiny_recipes["gpt"], tmp_path / "run", "train.steps=2")
    with pytest.raises(ResumeError, match="seed"):
        train(tiny_recipes["gpt"], tmp_path / "run", "seed=3")
    plan = bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"], ["seed=3", "train.steps=4"]))
    bigtrain.train(plan, tmp_path / "run", allowed=["seed"])
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]


def test_fewer_steps_than_are_done_change_nothing(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_recipes["gpt"], tmp_path / "run", "train.steps=3")
    before = (tmp_path / "run" / "plan.yaml").read_text()
    train(tiny_recipes["gpt"], tmp_path / "run", "train.steps=2")
    assert (tmp_path / "run" / "plan.yaml").read_text() == before


def test_other_data_are_refused_unless_allowed(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the river falls slowly and the bird sings again\n\n" * 90)
    source = f"data.source={texts}"
    train(tiny_recipes["gpt"], tmp_path / "run", source, "train.steps=2")
    texts.write_text("the river falls slowly and the bird sings again\n\n" * 91)
    with pytest.raises(DataError, match="not those that the checkpoint was reading"):
        train(tiny_recipes["gpt"], tmp_path / "run", source, "train.steps=4")
    plan = bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"], [source, "train.steps=4"]))
    bigtrain.train(plan, tmp_path / "run", allowed=["data"])
    assert losses(read_metrics(tmp_path / "run")).keys() == {1, 2, 3, 4}


def test_a_corpus_smaller_than_a_batch_is_refused_before_a_folder_is_made(
    tiny_recipes: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="global_batch_size"):
        train(tiny_recipes["gpt"], tmp_path / "run", "train.global_batch_size=100000", "train.micro_batch_size=auto")
    assert not (tmp_path / "run").exists()


def test_other_data_need_the_tokenizer_that_the_weights_know(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_recipes["gpt"], tmp_path / "run", "train.steps=2")
    texts = tmp_path / "texts.txt"
    texts.write_text("a wholly different thing is written here today\n\n" * 90)
    changes = ["train.steps=3", f"data.source={texts}"]
    plan = bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"], changes))
    with pytest.raises(CheckpointError, match=r"data.source: .* with another tokenizer; use data.tokenizer="):
        bigtrain.train(plan, tmp_path / "run", allowed=["data"])


def test_fewer_steps_than_are_done_are_told(
    tiny_recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_recipes["gpt"], tmp_path / "run", "train.steps=3")
    capsys.readouterr()
    train(tiny_recipes["gpt"], tmp_path / "run", "train.steps=2")
    assert "run: 3 steps are done already, and 2 are asked for; for more, raise train.steps" in capsys.readouterr().out


def test_a_damaged_plan_is_written_anew(
    tiny_recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny_recipes["gpt"], run, "train.steps=3", *CONSTANT)
    before = (run / "plan.yaml").read_text()
    (run / "plan.yaml").write_text("")
    with pytest.raises(ResumeError, match=r"seed: 3, but 1234 in .*step-00000003/plan.yaml"):
        train(tiny_recipes["gpt"], run, "train.steps=4", "seed=3", *CONSTANT)
    train(tiny_recipes["gpt"], run, "train.steps=4", *CONSTANT)
    told = f"{run / 'plan.yaml'}: damaged or gone; written anew, after {run / 'step-00000003' / 'plan.yaml'}"
    assert capsys.readouterr().err.count(told) == 1
    assert (run / "plan.yaml").read_text() == before.replace("steps: 3", "steps: 4")


def test_a_folder_that_another_launch_has_begun_meanwhile_is_refused(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def meanwhile(*_args: Any, **_options: Any) -> None:
        run.mkdir()
        (run / "plan.yaml").write_text("another's")

    monkeypatch.setattr(loop, "_start_from", meanwhile)
    with pytest.raises(ResumeError, match="run: another launch has begun a run in it; launch again to go on with that"):
        train(tiny_recipes["gpt"], run)
    assert (run / "plan.yaml").read_text() == "another's"


def test_other_versions_are_told_when_a_run_goes_on(
    tiny_recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny_recipes["gpt"], run, "train.steps=3")
    found = json.loads((run / "env.json").read_text())
    found["versions"]["torch"] = "1.0"
    (run / "env.json").write_text(json.dumps(found))
    train(tiny_recipes["gpt"], run, "train.steps=4")
    assert f"going on with torch {torch.__version__} (was 1.0): losses may differ" in capsys.readouterr().out
    train(tiny_recipes["gpt"], run, "train.steps=5")
    assert "losses may differ" not in capsys.readouterr().out
