"""One run by several launchers: of nodes that meet, here all on this machine, of torchrun, and of Slurm's tasks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import bigtrain
from bigtrain.errors import RecipeError
from bigtrain.launcher import check_devices, launch, on_ranks_here, started_ranks
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.plan import plan
from bigtrain.world import World

Launcher = subprocess.Popen[str]

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "localhost",
}


def start(recipe: Path, run: Path, *overrides: str, with_: Mapping[str, str] | None = None) -> Launcher:
    argv = [sys.executable, "-m", "bigtrain", "launch", str(recipe), *overrides, "--run-dir", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(with_ or {})}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finished(*launchers: Launcher, seconds: float = 200) -> list[tuple[int, str]]:
    outputs = [launcher.communicate(timeout=seconds)[0] for launcher in launchers]
    return [(launcher.returncode, output) for launcher, output in zip(launchers, outputs, strict=True)]


def losses(run: Path) -> list[float]:
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def wait_for(what: Callable[[], bool], *launchers: Launcher) -> None:
    end = time.monotonic() + 200
    while not what():
        if time.monotonic() > end or any(launcher.poll() is not None for launcher in launchers):
            for launcher in launchers:
                launcher.kill()
            pytest.fail("\n----\n".join(launcher.communicate()[0] for launcher in launchers))
        time.sleep(0.05)


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.fixture
def place() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def alone(tiny_recipes: dict[str, Path], tmp_path: Path) -> list[float]:
    """Return the losses of a run of one process, and have the data prepared."""
    recipe = bigtrain.load_recipe(tiny_recipes["gpt"], ["train.steps=6", "train.dropout=0"])
    bigtrain.train(plan(recipe), tmp_path / "alone")
    return losses(tmp_path / "alone")


def test_without_a_place_nodes_cannot_meet(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    recipe = bigtrain.load_recipe(tiny_recipes["gpt"], ["cluster.nodes=2"])
    text = r"command line: cluster.rendezvous: missing: 2 nodes need a place to meet; write the name of one and a free"
    with pytest.raises(RecipeError, match=text):
        launch(plan(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_an_error_on_several_nodes(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        place = f"127.0.0.1:{used.getsockname()[1]}"
        recipe = bigtrain.load_recipe(tiny_recipes["gpt"], ["cluster.nodes=2", f"cluster.rendezvous={place}"])
        with pytest.raises(RecipeError, match=rf"command line: cluster.rendezvous: {place}: the port is in use"):
            launch(plan(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_place_that_is_not_reached_is_named(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    keys = ["cluster.nodes=2", "cluster.rendezvous=nowhere.invalid:29400", "cluster.timeout=200ms"]
    recipe = bigtrain.load_recipe(tiny_recipes["gpt"], keys)
    with pytest.raises(RecipeError, match=r"rendezvous: nowhere.invalid:29400 was not reached within 0.2 s"):
        launch(plan(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(
    tiny_recipes: dict[str, Path], tmp_path: Path, place: str, alone: list[float]
) -> None:
    run = tmp_path / "run"
    keys = ("train.steps=6", "train.dropout=0", "cluster.nodes=2", f"cluster.rendezvous={place}")
    keys = (*keys, "checkpoint.every_steps=1")
    ends = finished(*(start(tiny_recipes["gpt"], run, *keys) for _ in range(2)))
    assert [code for code, _ in ends] == [0, 0], ends
    assert losses(run) == pytest.approx(alone, rel=1e-5)
    assert "on 2 x" in ends[0][1] + ends[1][1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_process_is_started_again_and_a_killed_launcher_takes_all_with_it(
    tiny_recipes: dict[str, Path], tmp_path: Path, place: str
) -> None:
    run = tmp_path / "run"
    keys = ("train.steps=100000", "cluster.nodes=1:2", f"cluster.rendezvous={place}", "checkpoint.every_steps=2")
    process = start(tiny_recipes["gpt"], run, *keys)
    wait_for(lambda: len(losses(run)) > 3, process)
    (agent,) = children(process.pid)
    (worker,) = children(agent)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: bool(children(agent)) and children(agent) != [worker], process)
    before = len(losses(run))
    wait_for(lambda: len(losses(run)) > before + 3, process)
    (worker,) = children(agent)

    process.kill()
    end = time.monotonic() + 5
    while (is_alive(agent) or is_alive(worker)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(agent) and not is_alive(worker)
    assert "was ended by SIGKILL; starting again from step" in process.communicate()[0]


@pytest.mark.slow
def test_nodes_with_other_recipes_are_refused_on_each(
    tiny_recipes: dict[str, Path], tmp_path: Path, place: str, alone: list[float]
) -> None:
    keys = ("cluster.nodes=2", f"cluster.rendezvous={place}")
    ends = finished(*(start(tiny_recipes["gpt"], tmp_path / "run", f"seed={seed}", *keys) for seed in (1, 2)))
    for code, output in ends:
        assert code == 2, output
        (line,) = output.splitlines()
        assert line.startswith("error: the nodes differ: recipe is seed: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_starts_ranks_and_passes_signals_on(
    tiny_recipes: dict[str, Path], tmp_path: Path, alone: list[float]
) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=localhost:0", "-m", "bigtrain", "launch", str(tiny_recipes["gpt"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = [*torchrun, "train.steps=6", "train.dropout=0", "--run-dir", str(run)]
    ran = subprocess.run(done, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert losses(run) == pytest.approx(alone, rel=1e-5)

    argv = [*torchrun, "train.steps=100000", "train.dropout=0", "--run-dir", str(run)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    wait_for(lambda: len(losses(run)) > 8, process)
    process.send_signal(signal.SIGTERM)
    ((code, output),) = finished(process)
    assert code != 0  # torchrun does not pass exit codes on
    saved = max(int(folder.name.removeprefix("step-")) for folder in run.glob("step-*"))
    assert f"SIGTERM: saved step {saved}; launch again to go on" in output


@pytest.mark.slow
def test_tasks_of_slurm_are_ranks(tiny_recipes: dict[str, Path], tmp_path: Path, alone: list[float]) -> None:
    tasks = [{**SLURM, "SLURM_PROCID": task, "SLURM_LOCALID": task} for task in "01"]
    run = tmp_path / "run"
    keys = ("train.steps=6", "train.dropout=0")
    ends = finished(*(start(tiny_recipes["gpt"], run, *keys, with_=task) for task in tasks))
    assert [code for code, _ in ends] == [0, 0], ends
    assert losses(run) == pytest.approx(alone, rel=1e-5)


@pytest.fixture
def in_slurm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def be(**changes: str) -> None:
        monkeypatch.delenv("RANK", raising=False)
        for name, value in {**SLURM, **changes}.items():
            monkeypatch.setenv(name, value)

    return be


ONE_A_NODE = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "n[1-2]"}


def test_a_task_with_a_place_to_meet_is_the_launcher_of_its_node(
    tiny_recipes: dict[str, Path], in_slurm: Callable[..., None]
) -> None:
    met = bigtrain.load_recipe(tiny_recipes["gpt"], ["cluster.nodes=2", "cluster.rendezvous=n1:29400"])
    plain = bigtrain.load_recipe(tiny_recipes["gpt"])
    assert started_ranks(plain) is None
    in_slurm(**ONE_A_NODE)
    assert started_ranks(met) is None
    assert on_ranks_here(met) is met
    assert started_ranks(plain) == World(0, 2, 0, 1)
    assert on_ranks_here(plain).cluster.nodes == 2
    in_slurm()
    with pytest.raises(RecipeError, match=r"n1:29400 is where one launcher of each node .* started 2 tasks here; use"):
        started_ranks(met)


def test_the_nodes_that_slurm_has_started_are_those_of_the_recipe(
    tiny_recipes: dict[str, Path], in_slurm: Callable[..., None]
) -> None:
    in_slurm(**ONE_A_NODE)
    assert on_ranks_here(bigtrain.load_recipe(tiny_recipes["gpt"], ["cluster.nodes=1:2"])).cluster.nodes == 2
    with pytest.raises(RecipeError, match="cluster.nodes: 4, but the processes that were started are on 2"):
        on_ranks_here(bigtrain.load_recipe(tiny_recipes["gpt"], ["cluster.nodes=4", "train.micro_batch_size=1"]))


@pytest.mark.parametrize(("devices", "text"), [(8, "2 tasks on this node, which has 8 GPUs"), (2, ""), (1, "")])
def test_slurm_starts_a_task_for_each_gpu_which_may_see_its_own_alone(
    tiny_recipes: dict[str, Path], in_slurm: Callable[..., None], devices: int, text: str
) -> None:
    in_slurm()
    recipe = on_ranks_here(bigtrain.load_recipe(tiny_recipes["gpt"], ["train.device=auto"]))
    planned = plan(recipe, Hardware("cuda", "a GPU", devices, 2**36, capability=(9, 0)))
    if text:
        with pytest.raises(RecipeError, match=f"{text}; use srun --ntasks-per-node=8, or cluster.rendezvous with one"):
            check_devices(planned)
    else:
        check_devices(planned)
