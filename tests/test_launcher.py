"""The launcher: checks first, one process for the work, its exit code, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bigtrain
from bigtrain.errors import DataError, RecipeError, ResumeError
from bigtrain.launcher import (
    ALLOCATOR,
    HUGE_PAGES,
    MMAP_THRESHOLD,
    REPEATABLE,
    TRIM_THRESHOLD,
    adopt_environment,
    check_init_from,
    launch,
    plan_again,
    profile_ranks,
    worker_environment,
)
from bigtrain.planner.plan import Plan


def planned(recipe: Path, *overrides: str) -> Plan:
    return bigtrain.plan(bigtrain.load_recipe(recipe, list(overrides)))


def start(recipe: Path, run: Path, *overrides: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "bigtrain", "launch", str(recipe), *overrides, "--run-dir", str(run)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(run: Path, steps: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        path = run / "metrics.jsonl"
        if path.is_file() and len(path.read_text().splitlines()) >= steps:
            return
        time.sleep(0.05)
    pytest.fail("no steps within two minutes")


def workers(launcher: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if f"\nPPid:\t{launcher}\n" in text:
            found.append(int(status.parent.name))
    return found


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_on_the_cpu_large_tensors_are_mapped_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MMAP_THRESHOLD, raising=False)
    assert worker_environment("cpu")[MMAP_THRESHOLD] == str(2**20)
    assert worker_environment("cpu")[HUGE_PAGES] == "1" and HUGE_PAGES not in worker_environment("cuda")
    assert worker_environment("cpu")[REPEATABLE] == "AUTO"
    assert MMAP_THRESHOLD not in worker_environment("cuda")
    assert worker_environment("cpu")[TRIM_THRESHOLD] == str(2**26)
    assert worker_environment("cuda")[ALLOCATOR] == "expandable_segments:True"
    assert ALLOCATOR not in worker_environment("cpu")
    assert MMAP_THRESHOLD not in os.environ


def test_a_run_that_goes_on_keeps_what_was_chosen(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    recipe = bigtrain.load_recipe(tiny_recipes["bert"], ["recompute.policy=auto"])
    assert plan_again(recipe, tmp_path).recipe.recompute.policy == "none"
    stored = planned(tiny_recipes["bert"], "recompute.policy=full")
    (tmp_path / "plan.yaml").write_text(stored.to_yaml())
    assert plan_again(recipe, tmp_path).recipe.recompute.policy == "full"


def test_this_process_adopts_what_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    adopt_environment("cuda")
    assert os.environ == {ALLOCATOR: "expandable_segments:True"}
    monkeypatch.setattr(os, "environ", {ALLOCATOR: "backend:native"})
    adopt_environment("cuda")
    assert os.environ[ALLOCATOR] == "backend:native"


def test_the_users_own_threshold_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MMAP_THRESHOLD, "4096")
    assert worker_environment("cpu")[MMAP_THRESHOLD] == worker_environment("cuda")[MMAP_THRESHOLD] == "4096"


def test_the_environment_of_the_user_reaches_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for kind in ("cpu", "cuda"):
        assert worker_environment(kind)["OMP_NUM_THREADS"] == "3"


def test_a_run_in_a_process_of_its_own(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    assert launch(planned(tiny_recipes["gpt"], "train.steps=3"), tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


def test_the_process_and_the_library_give_the_same_losses(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    plan = planned(tiny_recipes["bert"], "train.steps=4")
    launch(plan, tmp_path / "launched")
    bigtrain.train(plan, tmp_path / "called")
    one, other = (
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("launched", "called")
    )
    assert one == other


def test_ranks_are_told_what_to_profile(tiny_recipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Started:
        def __init__(self, argv: list[str], *_: object) -> None:
            started.append(argv)

        def run(self) -> int:
            return 0

    monkeypatch.setattr("bigtrain.launcher.Workers", Started)
    plan = planned(tiny_recipes["gpt"], "cluster.devices_per_node=2", "train.micro_batch_size=4")
    assert profile_ranks(plan, of_time=True, as_json=True, html=None, png=Path("p.png")) == 0
    assert json.loads(started[0][-1]) == {"of_time": True, "as_json": True, "html": None, "png": "p.png"}


def test_another_recipe_in_the_folder_is_refused(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    assert launch(planned(tiny_recipes["gpt"], "train.steps=2"), tmp_path / "run") == 0
    with pytest.raises(ResumeError, match="seed"):
        launch(planned(tiny_recipes["gpt"], "seed=9"), tmp_path / "run")
    other = planned(tiny_recipes["gpt"], "train.dropout=0", "train.steps=3")
    assert launch(other, tmp_path / "run", allowed=["train.dropout"]) == 0


def test_init_from_nothing_is_refused(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    plan = planned(tiny_recipes["gpt"], f"train.init_from={tmp_path / 'absent'}")
    with pytest.raises(RecipeError, match=r"^command line: train.init_from: .*absent: holds no checkpoint"):
        check_init_from(plan)
    with pytest.raises(RecipeError):
        launch(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_corpus_smaller_than_a_batch_names_its_place(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    plan = planned(tiny_recipes["gpt"], "train.global_batch_size=100000", "train.micro_batch_size=auto")
    with pytest.raises(
        DataError, match=r"^command line: train.global_batch_size: the data gives \d+ rows of 32 tokens"
    ):
        launch(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_init_from_another_shape_is_refused_before_anything_starts(
    tiny_recipes: dict[str, Path], tmp_path: Path
) -> None:
    assert launch(planned(tiny_recipes["gpt"], "train.steps=1"), tmp_path / "first") == 0
    plan = planned(tiny_recipes["gpt"], f"train.init_from={tmp_path / 'first'}", "model.hidden_size=64")
    with pytest.raises(RecipeError, match=r"a model of another shape: hidden_size is 32 there and 64 here"):
        launch(plan, tmp_path / "run")
    with pytest.raises(RecipeError, match="File name too long"):
        check_init_from(planned(tiny_recipes["gpt"], f"train.init_from={'x' * 300}"))


def test_the_environment_names_the_command_of_the_user(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    process = start(tiny_recipes["gpt"], tmp_path / "run", "train.steps=1")
    process.communicate(timeout=120)
    command = json.loads((tmp_path / "run" / "env.json").read_text())["command"]
    assert command[1:] == ["launch", str(tiny_recipes["gpt"]), "train.steps=1", "--run-dir", str(tmp_path / "run")]


def test_what_the_worker_finds_wrong_is_one_line_and_exit_2(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    assert launch(planned(tiny_recipes["gpt"], "train.steps=1"), tmp_path / "first") == 0
    texts = tmp_path / "texts.txt"
    texts.write_text("a wholly different thing is written here today\n\n" * 90)
    argv = [
        *[sys.executable, "-m", "bigtrain", "launch", str(tiny_recipes["gpt"]), f"data.source={texts}"],
        *[f"train.init_from={tmp_path / 'first'}", "--run-dir", str(tmp_path / "run")],
    ]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("error: ")
    assert "with another tokenizer" in ran.stderr
    assert not (tmp_path / "run").exists()


def test_sigterm_saves_and_exits_75_and_the_same_command_goes_on(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(tiny_recipes["gpt"], run, "train.steps=100000")
    wait_for_steps(run, 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    saved = max(int(folder.name.removeprefix("step-")) for folder in run.glob("step-*"))
    assert f"saved step {saved}" in output
    assert launch(planned(tiny_recipes["gpt"], f"train.steps={saved + 2}"), run) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_killed_launcher_takes_its_worker_with_it(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    process = start(tiny_recipes["gpt"], tmp_path / "run", "train.steps=100000")
    wait_for_steps(tmp_path / "run", 2)
    children = workers(process.pid)
    assert children
    process.kill()
    process.communicate()
    end = time.monotonic() + 5
    while any(map(is_alive, children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_alive, children))


def test_a_worker_that_is_killed_is_started_again(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(tiny_recipes["gpt"], run, "train.steps=100000")
    wait_for_steps(run, 7)
    (worker,) = workers(process.pid)
    os.kill(worker, signal.SIGKILL)
    before = len((run / "metrics.jsonl").read_text().splitlines())
    wait_for_steps(run, before + 3)
    assert workers(process.pid) != [worker]
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "the training process was ended by SIGKILL; starting again from step" in output


def test_a_signal_to_the_whole_group_saves_once(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "bigtrain", "launch", str(tiny_recipes["gpt"]), "train.steps=100000"]
    process = subprocess.Popen([*argv, "--run-dir", str(tmp_path / "run")], stdout=subprocess.DEVNULL, process_group=0)
    wait_for_steps(tmp_path / "run", 3)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 75
    assert list((tmp_path / "run").glob("step-*"))


def test_a_module_of_the_current_folder_does_not_shadow_the_library(
    tiny_recipes: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "numbers.py").write_text("raise SystemExit('shadowed')")
    script = "import sys; sys.path[:] = [p for p in sys.path if p]; from bigtrain.cli import main; main()"
    argv = [sys.executable, "-P", "-c", script, "launch", str(tiny_recipes["gpt"]), "train.steps=1"]
    ran = subprocess.run([*argv, "--run-dir", "run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_two_launches_of_one_folder(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    process = start(tiny_recipes["gpt"], tmp_path / "run", "train.steps=100000")
    wait_for_steps(tmp_path / "run", 2)
    second = start(tiny_recipes["gpt"], tmp_path / "run", "train.steps=100000")
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert "in use by process " in output
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_a_run_goes_on_without_the_one_it_was_started_from(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    assert launch(planned(tiny_recipes["gpt"], "train.steps=1"), tmp_path / "first") == 0
    changes = (f"train.init_from={tmp_path / 'first'}",)
    assert launch(planned(tiny_recipes["gpt"], "train.steps=1", *changes), tmp_path / "next") == 0
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    assert launch(planned(tiny_recipes["gpt"], "train.steps=2", *changes), tmp_path / "next") == 0
