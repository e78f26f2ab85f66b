"""Which run folders may be gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest

import bigtrain
from bigtrain.checkpoint import manifest, tensors
from bigtrain.checkpoint.resume import as_chosen_before, check_resume, earlier_recipe, stored_recipe
from bigtrain.config.schema import Recipe
from bigtrain.errors import InputError, RecipeError, ResumeError
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.plan import Plan, plan

LARGE = Hardware("cpu", "a processor", 1, 2**40)


def planned(*overrides: str) -> Plan:
    return plan(bigtrain.load_recipe("quickstart_bert", ["train.device=cpu", *overrides]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "plan.yaml").write_text(planned().to_yaml())
    return tmp_path


def test_a_new_folder_and_the_same_recipe_are_fine(run: Path, tmp_path: Path) -> None:
    check_resume(run, planned().recipe)
    check_resume(tmp_path / "absent", planned("seed=5").recipe)


@pytest.mark.parametrize(
    "change",
    ["train.steps=7", "train.tokens=3M", "train.epochs=1", "train.eval_every=5", "train.micro_batch_size=1",
     "checkpoint.every_steps=3", "logging.every_steps=1", "memory.budget=3GiB", "cluster.devices_per_node=1"],
)  # fmt: skip
def test_what_does_not_change_the_mathematics_may_change(run: Path, change: str) -> None:
    check_resume(run, planned(change).recipe)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=5", "seed"),
        ("train.dropout=0.25", "train.dropout"),
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate"),
        ("model.num_hidden_layers=1", "model.num_hidden_layers"),
        ("data.validation_fraction=0.3", "data.validation_fraction"),
    ],
)
def test_another_recipe_is_refused_by_key(run: Path, change: str, key: str) -> None:
    with pytest.raises(ResumeError) as caught:
        check_resume(run, planned(change).recipe)
    assert str(caught.value).startswith(f"command line: {key}: ")
    assert f"--allow {key}" in str(caught.value)
    check_resume(run, planned(change).recipe, allowed=[key])
    check_resume(run, planned(change).recipe, allowed=[key.split(".")[0]])


def test_what_differs_is_shown_as_a_recipe_has_it(run: Path) -> None:
    with pytest.raises(ResumeError) as caught:
        check_resume(run, planned("train.max_grad_norm=null", "data.packing=false").recipe)
    for line in ("data.packing: false, but true in ", "train.max_grad_norm: null, but 1.0 in "):
        assert f"command line: {line}" in str(caught.value)


def test_every_difference_is_told(run: Path) -> None:
    with pytest.raises(ResumeError) as caught:
        check_resume(run, planned("seed=5", "train.dropout=0.25").recipe)
    assert len(caught.value.faults) == 2


def test_a_key_that_does_not_exist_cannot_be_allowed(run: Path) -> None:
    with pytest.raises(InputError, match=r"^command line: --allow: no key 'optimizer.learning_rat'; did you mean"):
        check_resume(run, planned().recipe, allowed=["optimizer.learning_rat"])


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"^command line: --run-dir: .*file is a file; name another folder$"):
            check_resume(folder, planned().recipe)
    for folder in (tmp_path / ("x" * 300), Path("/proc/run")):
        with pytest.raises(InputError, match=r"^command line: --run-dir: .*; name another folder$"):
            check_resume(folder, planned().recipe)


def test_the_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    check_resume(tmp_path / "runs" / "new", planned().recipe)
    assert list(tmp_path.iterdir()) == []


def test_a_stored_recipe_needs_nothing_of_what_it_names(tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("some text")
    (tmp_path / "plan.yaml").write_text(planned(f"data.source={source}").to_yaml())
    source.unlink()
    assert stored_recipe(tmp_path).data.source == str(source)


def test_a_stored_recipe_that_is_absent_or_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="no folder of a run"):
        stored_recipe(tmp_path)
    (tmp_path / "plan.yaml").write_text("model: [")
    with pytest.raises(RecipeError):
        stored_recipe(tmp_path)


def opened(*overrides: str) -> Recipe:
    return bigtrain.load_recipe("quickstart_bert", ["optimizer.state=auto", *overrides])


def run_of(folder: Path, *overrides: str) -> Path:
    """Write the plan of a run that chose otherwise than anyone would today."""
    pinned = ("train.micro_batch_size=2", "recompute.policy=full", "optimizer.state=bf16", "train.device=cpu")
    planned = bigtrain.plan(bigtrain.load_recipe("quickstart_bert", [*pinned, "memory.budget=4GiB", *overrides]), LARGE)
    (folder / "plan.yaml").write_text(planned.to_yaml())
    return folder


def test_what_a_run_chose_is_chosen_again(tmp_path: Path) -> None:
    found = as_chosen_before(opened(), run_of(tmp_path), LARGE)
    assert (found.train.micro_batch_size, found.recompute.policy, found.optimizer.state) == (2, "full", "bf16")
    assert found.memory.budget == 4 * 2**30


@pytest.mark.parametrize(
    "now", ["train.micro_batch_size=4", "optimizer.state=fp32", "memory.budget=1GiB", "train.global_batch_size=4"]
)
def test_where_something_else_is_written_now_everything_is_chosen_anew(tmp_path: Path, now: str) -> None:
    assert as_chosen_before(opened(now), run_of(tmp_path), LARGE) == opened(now)


def test_what_is_written_as_it_was_changes_nothing(tmp_path: Path) -> None:
    found = as_chosen_before(opened("train.micro_batch_size=2"), run_of(tmp_path), LARGE)
    assert (found.train.micro_batch_size, found.recompute.policy) == (2, "full")


def test_without_a_run_everything_stays_open(tmp_path: Path) -> None:
    assert as_chosen_before(opened(), tmp_path, LARGE) == opened()


@pytest.mark.parametrize(
    ("hardware", "overrides"),
    [
        (Hardware("cuda", "a GPU", 1, 2**40), ()),
        (Hardware("cpu", "a small one", 1, 2**30), ()),
        (LARGE, ("cluster.nodes=2",)),
        (LARGE, ("cluster.devices_per_node=4",)),
    ],
)
def test_elsewhere_everything_is_chosen_anew(tmp_path: Path, hardware: Hardware, overrides: tuple[str, ...]) -> None:
    recipe = opened(*overrides)
    assert as_chosen_before(recipe, run_of(tmp_path), hardware) == recipe


def checkpoint_of(run: Path, step: int, text: str | None = None) -> Path:
    """Write a checkpoint that holds a plan alone."""
    folder = run / manifest.folder_name(step)
    folder.mkdir()
    digest = tensors.write_bytes(folder / "plan.yaml", (text or planned().to_yaml()).encode())
    (folder / manifest.MANIFEST).write_bytes(manifest.encode({"step": step, "files": {"plan.yaml": digest._asdict()}}))
    return folder


def break_plan(run: Path, how: str) -> None:
    path = run / "plan.yaml"
    text = path.read_text()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        damaged = {"empty": "", "cut": text[: len(text) // 2], "zeros": "\0" * 4096, "not YAML": "model: ["}
        path.write_text(damaged[how])


BROKEN = ("gone", "folder", "empty", "cut", "zeros", "not YAML")


@pytest.mark.parametrize("how", BROKEN)
def test_a_plan_that_is_damaged_is_read_in_the_newest_checkpoint_that_has_one(run: Path, how: str) -> None:
    assert check_resume(run, planned().recipe) == run / "plan.yaml"
    good = checkpoint_of(run, 5)
    (checkpoint_of(run, 7) / "plan.yaml").write_text(planned("seed=9").to_yaml())
    checkpoint_of(run, 8, planned("seed=9").to_yaml()).joinpath(manifest.MANIFEST).unlink()
    break_plan(run, how)
    assert check_resume(run, planned().recipe) == good / "plan.yaml"
    earlier = earlier_recipe(run)
    assert earlier is not None and earlier.recipe == planned().recipe
    with pytest.raises(ResumeError, match=rf"^command line: seed: 5, but 1234 in {good / 'plan.yaml'}; use another"):
        check_resume(run, planned("seed=5").recipe)


@pytest.mark.parametrize("how", BROKEN)
def test_without_any_plan_it_says_what_to_do(run: Path, how: str) -> None:
    (checkpoint_of(run, 7) / "plan.yaml").write_text(planned("seed=9").to_yaml())
    break_plan(run, how)
    put_back = r"plan.yaml.*; this run cannot go on, and none of the checkpoints has an undamaged one; put it back, or "
    with pytest.raises(ResumeError, match=put_back) as caught:
        check_resume(run, planned().recipe)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("how", ["folder", "empty", "zeros"])
def test_a_run_without_checkpoints_and_plan_may_begin_anew(run: Path, how: str) -> None:
    break_plan(run, how)
    with pytest.raises(ResumeError, match="; this run cannot go on, delete it, or name another --run-dir"):
        check_resume(run, planned().recipe)


def test_a_plan_that_cannot_be_read_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_path: Path, *_how: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ResumeError, match=r"plan.yaml: Permission denied; make it readable"):
        stored_recipe(run)


def test_an_older_plan_without_a_newer_key_is_whole(run: Path) -> None:
    text = (run / "plan.yaml").read_text().replace("  label_smoothing: 0.0\n", "")
    (run / "plan.yaml").write_text(text)
    assert check_resume(run, planned().recipe) == run / "plan.yaml"
