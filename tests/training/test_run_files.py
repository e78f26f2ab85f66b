"""plan.yaml and env.json: what the run was, nothing that is nobody's business."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

import bigtrain
from bigtrain.training import run_files


def test_plan_and_environment_are_written(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    plan = bigtrain.plan(bigtrain.load_recipe(tiny_recipes["bert"]))
    run = tmp_path / "run"
    run.mkdir()
    run_files.write_run_files(run, plan)
    assert sorted(file.name for file in run.iterdir()) == ["env.json", "plan.yaml"]
    assert bigtrain.load_recipe(run / "plan.yaml") == plan.recipe
    written = json.loads((run / "env.json").read_text())
    assert written["device"] == plan.hardware.name and written["threads"] >= 1
    assert written["versions"] == run_files.versions()


def test_folders_in_the_place_of_files_are_moved_aside(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    plan = bigtrain.plan(bigtrain.load_recipe(tiny_recipes["bert"]))
    for number in range(3):
        for name in ("plan.yaml", "env.json"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "precious").write_text(str(number))
        run_files.write_run_files(tmp_path, plan)
        (tmp_path / "plan.yaml").unlink()
        (tmp_path / "env.json").unlink()
    for name in ("plan.yaml", "env.json"):
        kept = [tmp_path / f"bad-{name}{end}" / "precious" for end in ("", "-1", "-2")]
        assert [file.read_text() for file in kept] == ["0", "1", "2"]


def test_versions_are_those_that_are_installed() -> None:
    found = run_files.versions()
    assert found["bigtrain"] == bigtrain.__version__
    assert {name: metadata.version(name) for name in run_files.DEPENDENCIES}.items() <= found.items()


def test_the_revision_is_that_of_the_checkout() -> None:
    checkout = Path(run_files.__file__).parents[2]
    found = run_files.git_revision()
    if not (checkout / ".git").exists():
        assert found is None
        return
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=checkout, check=False)
    assert found == (head.stdout.strip() or None)


def test_environment_names_no_secret(tiny_recipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    plan = bigtrain.plan(bigtrain.load_recipe(tiny_recipes["bert"]))
    assert "s3cret" not in json.dumps(run_files.environment(plan))


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_files.shutil, "which", lambda _name: None)
    assert run_files.git_revision() is None


def test_what_bits_depend_on_and_is_another_now_is_named(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    plan = bigtrain.plan(bigtrain.load_recipe(tiny_recipes["bert"]))
    assert run_files.changes_since(tmp_path, plan) == ""
    run_files.write_run_files(tmp_path, plan)
    assert run_files.changes_since(tmp_path, plan) == ""
    file = tmp_path / "env.json"
    before = json.loads(file.read_text())
    threads = before["threads"]
    before["versions"]["torch"], before["threads"], before["command"] = "1.0", 99, ["another"]
    file.write_text(json.dumps(before))
    expected = f"torch {metadata.version('torch')} (was 1.0), threads {threads} (was 99)"
    assert run_files.changes_since(tmp_path, plan) == expected


@pytest.mark.parametrize("text", ["", "[]", "{", '{"versions": 3}', '{"threads": [[1]], "versions": {"torch": null}}'])
def test_a_damaged_environment_tells_nothing(tiny_recipes: dict[str, Path], tmp_path: Path, text: str) -> None:
    (tmp_path / "env.json").write_text(text)
    assert run_files.changes_since(tmp_path, bigtrain.plan(bigtrain.load_recipe(tiny_recipes["bert"]))) == ""
