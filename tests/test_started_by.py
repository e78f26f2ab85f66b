"""Ranks that other launchers start: they find their places, and the run is the one of bigtrain's own launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import bigtrain
from bigtrain.launcher import plan_again, started_ranks
from bigtrain.world import World, check_told, joined, world_of

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
]
LAUNCHERS = {"torchrun": TORCHRUN, "accelerate": ACCELERATE}

MPIRUN = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}
ACCELERATE_CPU = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def start(launcher: list[str], *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, "-m", "bigtrain", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=580, check=False, env=environment)


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("eval_loss")) for row in rows]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    path = tmp_path_factory.mktemp("started") / "tiny.yaml"
    path.write_text(
        "model: {family: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}\n"
        f"data: {{source: {corpus_file}, vocab_size: 120, sequence_length: 32, validation_fraction: 0.1}}\n"
        "train: {objective: mlm, global_batch_size: 8, micro_batch_size: 2, steps: 4, eval_every: 2, device: cpu}\n"
        "optimizer: {learning_rate: 1e-2, warmup_steps: 10%}\n"
        "sharding: {zero_stage: 3}\n"
        "logging: {every_steps: 1, trackers: []}\n"
    )
    return path


@pytest.fixture(scope="module")
def own(recipe: Path) -> Path:
    """Return a run on two processes that bigtrain has started, the data prepared by then."""
    run = recipe.parent / "own"
    assert bigtrain.launch(bigtrain.plan(bigtrain.load_recipe(recipe, ["cluster.devices_per_node=2"])), run) == 0
    return run


@pytest.mark.slow
def test_there_is_a_run_to_compare_with(own: Path) -> None:
    """Two processes of the own launcher, with losses of four steps and two evaluations."""
    assert len(losses(own)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_run_is_that_of_the_own_launcher(name: str, recipe: Path, own: Path) -> None:
    run = recipe.parent / name
    ended = start(LAUNCHERS[name], "launch", str(recipe), "--run-dir", str(run))
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert losses(run) == losses(own)
    (headline,) = (line for line in ended.stdout.splitlines() if "4 steps of" in line)
    assert ", on 2 x " in headline
    assert ended.stdout.count(": done; look at ") == 1
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in own.iterdir())
    assert (run / "plan.yaml").read_text() == (own / "plan.yaml").read_text()


@pytest.mark.slow
def test_wrong_input_ends_each_process_with_2_and_torchrun_with_1(recipe: Path) -> None:
    run = recipe.parent / "wrong"
    ended = start(TORCHRUN, "launch", str(recipe), "cluster.devices_per_node=4", "--run-dir", str(run))
    assert ended.returncode == 1
    assert "exitcode  : 2 " in ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    text = "4, but 2 processes were started here (LOCAL_WORLD_SIZE); use 2, or auto"
    assert set(said) == {f"error: command line: cluster.devices_per_node: {text}"}
    assert not run.exists()


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (MPIRUN, r"^environment: OMPI_COMM_WORLD_SIZE=4: mpirun has started several .*; use torchrun, or set RANK, "),
        ({"PMI_SIZE": "2"}, r"^environment: PMI_SIZE=2: mpirun has started several processes and told none its rank; "),
        (ACCELERATE_CPU, r"--cpu starts one process, however many it is asked for; use accelerate launch --multi_gpu"),
    ],
    ids=["mpirun", "mpiexec", "accelerate launch --cpu"],
)
def test_processes_that_are_told_no_rank_are_refused(
    environment: Mapping[str, str], text: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    written = bigtrain.load_recipe(recipe)
    for attempt in (
        lambda: check_told(environment),
        lambda: started_ranks(written),
        lambda: plan_again(written, recipe.parent / "run"),
        lambda: joined(kind="cpu").__enter__(),
    ):
        with pytest.raises(bigtrain.InputError, match=text):
            attempt()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
        {"ACCELERATE_USE_CPU": "True"},
        {"MASTER_ADDR": "127.0.0.1"},
    ],
    ids=["nothing", "mpirun of one", "accelerate of one", "a place to meet alone"],
)
def test_a_process_that_is_alone_is_let_through(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_told(environment)
    with bigtrain.joined() as world:
        assert world == World()


def test_what_tells_a_rank_wins_over_what_does_not(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**MPIRUN, **ACCELERATE_CPU, "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert started_ranks(bigtrain.load_recipe(recipe)) == World(1, 2, 1, 2)


def test_a_launcher_of_each_node_may_be_started_by_mpirun(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in MPIRUN.items():
        monkeypatch.setenv(name, value)
    several = ["cluster.nodes=4", "cluster.rendezvous=node1:29400", "cluster.devices_per_node=1"]
    assert started_ranks(bigtrain.load_recipe(recipe, several)) is None


def test_deepspeeds_launcher_has_its_own_name_for_the_processes_of_a_machine() -> None:
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
    assert world_of(told) == World(5, 8, 1, 4)
    assert world_of({**told, "LOCAL_WORLD_SIZE": "2"}) == World(5, 8, 1, 2)


def test_a_plan_for_other_ranks_than_those_here_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch import nn

    from bigtrain import engine

    plan = bigtrain.plan(bigtrain.load_recipe(recipe))
    monkeypatch.setattr(engine, "current_world", lambda: World(0, 2, 0, 2))
    text = r"^the plan is for 1 ranks, and here are 2; plan with world_size=2, or .* `with bigtrain\.joined\(\):`$"
    with pytest.raises(bigtrain.InputError, match=text):
        bigtrain.prepare(nn.Linear(4, 4), plan, torch.optim.SGD)
