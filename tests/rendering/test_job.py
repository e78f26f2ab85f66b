"""What a job is made of, and what keeps a recipe from being one."""

from __future__ import annotations

from pathlib import Path

import job_files
import pytest

from bigtrain.errors import DoesNotFit, InputError, RecipeError
from bigtrain.planner import hardware as hardware_module
from bigtrain.rendering import job_file
from bigtrain.rendering.job import NOT_PLANNED, SCHEDULERS, Command, check_local, job_of


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as on a login node, whatever the machine that runs the tests has."""
    monkeypatch.setattr(hardware_module, "cuda_devices", lambda: None)


def faults(scheduler: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        job_of(scheduler, job_files.recipe(*overrides))
    return [str(fault) for fault in error.value.faults]


def test_machines_and_devices_are_the_recipes() -> None:
    job = job_of("slurm", job_files.recipe("cluster.nodes=2:4", "cluster.devices_per_node=8"))
    assert (job.least, job.most, job.devices) == (2, 4, 8)
    assert job.elastic
    assert not job.alone
    assert job.cuda
    assert job.shape == "2 to 4 machines x 8 GPUs"


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        (("train.device=cpu",), "1 machine x 1 process"),
        (("train.device=cpu", "cluster.nodes=3", "cluster.devices_per_node=2"), "3 machines x 2 processes"),
        (("cluster.devices_per_node=1",), "1 machine x 1 GPU"),
        (("cluster.nodes=2:2", "cluster.devices_per_node=4"), "2 machines x 4 GPUs"),
    ],
)
def test_shapes_in_words(overrides: tuple[str, ...], shape: str) -> None:
    overrides = (*overrides, "train.global_batch_size=48", "train.micro_batch_size=1")
    assert job_of("slurm", job_files.recipe(*overrides)).shape == shape


def test_what_the_processes_read_is_placed_already() -> None:
    recipe = job_files.recipe("cluster.nodes=2", "cluster.devices_per_node=4", "cluster.scheduler=slurm")
    job = job_of("slurm", recipe)
    assert job.recipe.train.device == "cuda"
    assert job.recipe.cluster.scheduler == "local"
    assert job.settled == ("train.device=cuda", "cluster.scheduler=local")
    kept = recipe.model_copy(update={"train": job.recipe.train, "cluster": job.recipe.cluster})
    assert kept == job.recipe


def test_nothing_is_settled_that_was_written() -> None:
    assert job_of("slurm", job_files.recipe("train.device=cuda", "cluster.devices_per_node=4")).settled == ()


def test_without_a_gpu_here_it_is_not_planned_and_says_so() -> None:
    assert job_of("slurm", job_files.recipe("cluster.devices_per_node=8")).note == NOT_PLANNED


def test_a_named_device_is_planned_for() -> None:
    recipe = job_files.recipe("cluster.devices_per_node=2", "cluster.nodes=2")
    note = job_of("slurm", recipe, "h100").note
    assert note.startswith("Predicted for 4 x h100: ")
    assert "micro-batch 2" in note


def test_a_gpu_that_is_here_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware_module, "cuda_devices", lambda: hardware_module.of_name("l4"))
    assert job_of("slurm", job_files.recipe("cluster.devices_per_node=2")).note.startswith("Predicted for 2 x l4: ")


def test_a_cpu_is_planned_for() -> None:
    job = job_of("slurm", job_files.recipe("train.device=cpu"))
    assert job.note.startswith("Predicted for ")
    assert not job.cuda


def test_a_named_cpu_needs_no_number_of_devices() -> None:
    job = job_of("slurm", job_files.recipe(), "cpu")
    assert (job.devices, job.settled) == (1, ("train.device=cpu",))


def test_what_does_not_fit_is_not_rendered() -> None:
    recipe = job_files.recipe("cluster.devices_per_node=1", "memory.budget=4MiB")
    with pytest.raises(DoesNotFit):
        job_of("slurm", recipe, "t4")


def test_a_device_of_another_kind_contradicts() -> None:
    with pytest.raises(RecipeError, match="train.device: 'cpu', but --device h100 is cuda"):
        job_of("slurm", job_files.recipe("train.device=cpu"), "h100")


def test_an_unknown_device_is_told() -> None:
    with pytest.raises(InputError, match="h100"):
        job_of("slurm", job_files.recipe(), "h10")


def test_gpus_need_a_number() -> None:
    (line,) = faults("slurm")
    assert "cluster.devices_per_node: auto: " in line
    assert "train.device=cpu" in line


@pytest.mark.parametrize("scheduler", ["kubernetes", "trainjob"])
def test_pods_need_an_image_and_a_volume_all_told_at_once(scheduler: str) -> None:
    lines = faults(scheduler)
    assert [line.split(": ")[1] for line in lines] == ["cluster.devices_per_node", "cluster.image", "cluster.volume"]
    assert all(f"--render {scheduler} needs" in line for line in lines[1:])


def test_the_job_decides_where_launchers_meet() -> None:
    (line,) = faults("slurm", "cluster.devices_per_node=2", "cluster.rendezvous=host:1")
    assert line.startswith("command line: cluster.rendezvous: 'host:1': ")
    assert line.endswith("use null")


@pytest.mark.parametrize(
    ("scheduler", "written", "instead"),
    [
        ("slurm", "kubernetes", "slurm or local"),
        ("kubernetes", "slurm", "kubernetes or local"),
        ("trainjob", "slurm", "kubernetes or local"),
    ],
)
def test_another_scheduler_in_the_recipe_contradicts(scheduler: str, written: str, instead: str) -> None:
    keys = ("train.device=cpu", *job_files.POD_KEYS, f"cluster.scheduler={written}")
    assert faults(scheduler, *keys) == [
        f"command line: cluster.scheduler: {written!r} contradicts --render {scheduler}; write {instead}"
    ]


@pytest.mark.parametrize("scheduler", ["kubernetes", "trainjob"])
def test_kubernetes_in_the_recipe_allows_both_of_its_files(scheduler: str) -> None:
    keys = ("train.device=cpu", *job_files.POD_KEYS, "cluster.scheduler=kubernetes")
    assert job_of(scheduler, job_files.recipe(*keys)).settled == ("cluster.scheduler=local",)


@pytest.mark.parametrize(("limit", "told"), [("180s", True), ("181s", False)])
def test_a_time_limit_leaves_time_before_the_signal(limit: str, told: bool) -> None:
    keys = ("train.device=cpu", f"cluster.time_limit={limit}")
    if told:
        (line,) = faults("slurm", *keys)
        assert "cluster.time_limit: 180s: Slurm asks a run to save 120 to 180 s before it; write more" in line
    else:
        job_of("slurm", job_files.recipe(*keys))


def test_a_trainjob_keeps_its_number_of_nodes() -> None:
    keys = ("train.device=cpu", *job_files.POD_KEYS, "cluster.nodes=2:4")
    (line,) = faults("trainjob", *keys)
    assert "cluster.nodes: '2:4': a TrainJob keeps its number of nodes" in line


@pytest.mark.parametrize(("scheduler", "room"), [("kubernetes", 61), ("trainjob", 54)])
def test_a_name_leaves_room_for_its_pods(scheduler: str, room: int) -> None:
    keys = ("train.device=cpu", *job_files.POD_KEYS, "cluster.nodes=8", "train.global_batch_size=8")
    job_of(scheduler, job_files.recipe(*keys, f"name={'a' * room}"))
    (line,) = faults(scheduler, *keys, f"name={'a' * (room + 1)}")
    assert f"{room + 1} letters, and a pod's host name has room for {room}" in line


def test_slurm_takes_any_name() -> None:
    job_of("slurm", job_files.recipe("train.device=cpu", f"name={'1x' * 40}"))


@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes"])
def test_a_run_here_and_now_is_local(scheduler: str) -> None:
    check_local(job_files.recipe())
    with pytest.raises(RecipeError, match=f"cluster.scheduler: '{scheduler}': .*; add --render {scheduler}, or write"):
        check_local(job_files.recipe(f"cluster.scheduler={scheduler}"))


def test_the_command_in_one_line() -> None:
    command = Command("a b.yaml", ("data.cache=/x $y",), Path("runs/it's"), ("seed", "name"))
    assert str(command) == (
        "bigtrain launch 'a b.yaml' 'data.cache=/x $y' --run-dir 'runs/it'\"'\"'s' --allow seed --allow name"
    )
    assert str(Command("quickstart_gpt")) == "bigtrain launch quickstart_gpt"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_scheduler_has_a_file(scheduler: str) -> None:
    keys = ("train.device=cpu", *job_files.POD_KEYS)
    text = job_file(scheduler, job_files.recipe(*keys), Command("quickstart_gpt", keys))
    assert text.endswith("\n")
    assert f"--render {scheduler}" in text.replace("\n#    ", "")
    assert "# Predicted for " in text


@pytest.mark.parametrize("case", job_files.CASES)
def test_files_are_as_they_were_looked_at(case: str) -> None:
    """After a change on purpose: `python tests/shared/job_files.py`, and look at what git shows."""
    assert job_files.shortened(job_files.printed(case)) == (job_files.GOLDEN / case).read_text(encoding="utf-8")


def test_there_is_no_other_golden_file() -> None:
    assert {path.name for path in job_files.GOLDEN.iterdir()} == set(job_files.CASES)
