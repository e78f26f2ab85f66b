"""The command line from outside: what each command prints, exit codes, one line a fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bigtrain
from bigtrain import cli


def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bigtrain", *map(str, argv)], capture_output=True, text=True, check=False
    )


def test_help_names_every_command() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    for command in ("launch", "plan", "profile", "prepare", "eval", "generate", "extend", "recipes", "doctor"):
        assert command in shown.stdout
    for listed in (shown, run("recipes", "--help")):
        cut_off = [line for line in listed.stdout.splitlines()[1:] if line.endswith("...")]
        assert not cut_off


def test_the_version_is_told_without_torch() -> None:
    code = "import sys; from bigtrain.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout, told.stderr) == (0, f"bigtrain {bigtrain.__version__}\nFalse\n", "")


def test_recipes_are_listed_shown_and_copied(tmp_path: Path) -> None:
    listed = run("recipes")
    assert listed.returncode == 0
    assert "quickstart_bert" in listed.stdout
    assert "bert_large_phase2" in listed.stdout
    shown = run("recipes", "show", "bert_large").stdout
    assert run("recipes", "copy", "bert_large", tmp_path / "mine.yaml").returncode == 0
    assert (tmp_path / "mine.yaml").read_text() == shown
    again = run("recipes", "copy", "gpt_7b", tmp_path / "mine.yaml")
    assert again.returncode == 2
    assert (tmp_path / "mine.yaml").read_text() == shown
    assert "did you mean 'bert_large'" in run("recipes", "show", "bert_larg").stderr


def test_a_plan_as_text_as_json_and_as_a_file(tmp_path: Path) -> None:
    text = run("plan", "bert_large", "train.device=cpu").stdout
    assert "335,174,458 parameters" in text
    shown = json.loads(
        run("plan", "bert_large", "train.device=cpu", "--json", "--output", tmp_path / "plan.yaml").stdout
    )
    assert shown["parameters"] == 335174458
    assert shown["memory"]["by_cause"]["weights"] == 4 * (335174458 + 6 * 1025)
    assert shown["choice"]["micro_batch_size"] * shown["choice"]["accumulation_steps"] == 256
    again = json.loads(run("plan", tmp_path / "plan.yaml", "--json").stdout)
    assert again["choice"] == shown["choice"]


def test_a_dry_run_prints_recipe_and_plan_and_makes_nothing(tmp_path: Path) -> None:
    shown = run("launch", "quickstart_bert", "--dry-run", "--run-dir", tmp_path / "run")
    assert shown.returncode == 0
    assert "micro_batch_size: 8" in shown.stdout
    assert "optimizer_state" in shown.stdout and "tokens/s" in shown.stdout
    assert not (tmp_path / "run").exists()


def test_a_plan_for_a_device_that_is_not_here(tmp_path: Path) -> None:
    argv = ("plan", "bert_large", "--device", "rtx4090", "--memory-budget", "12GiB", "--json")
    shown = json.loads(run(*argv, "--output", tmp_path / "plan.yaml").stdout)
    assert shown["device"] == "rtx4090" and shown["memory_budget_bytes"] == 12 * 2**30
    assert shown["memory"]["device_bytes_peak"] <= 12 * 2**30
    assert sum(shown["memory"]["by_cause"].values()) == shown["memory"]["allocated_bytes_peak"]
    again = json.loads(run("plan", tmp_path / "plan.yaml", "--device", "rtx4090", "--json").stdout)
    assert (again["choice"], again["memory"]) == (shown["choice"], shown["memory"])


def test_what_does_not_fit_is_one_line_and_exit_3(tmp_path: Path) -> None:
    refused = run("launch", "bert_large", "memory.budget=1GiB", "train.device=cpu", "--run-dir", tmp_path / "run")
    assert refused.returncode == 3
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: command line: memory.budget: 1GiB is ") and line.endswith(" would fit")
    assert not (tmp_path / "run").exists()


def test_a_job_file_is_printed_and_nothing_else_happens(tmp_path: Path) -> None:
    keys = ("cluster.nodes=2", "cluster.devices_per_node=2", "cluster.scheduler=slurm")
    shown = run("launch", "quickstart_gpt", *keys, "--render", "slurm", "--device", "t4", "--run-dir", tmp_path / "run")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("#!/usr/bin/env bash\n")
    assert "# Predicted for 4 x t4: " in shown.stdout
    assert f"--run-dir {tmp_path / 'run'}" in shown.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("--render", "pbs"), 2, "Invalid value for '--render'"),
        (("--render", "slurm", "--dry-run"), 2, "--dry-run: --render starts nothing either; leave out one of them"),
        (("--device", "t4"), 2, "--device: t4: a run takes what is here; add --render, or use plan"),
        (("--render", "slurm", "--device", "t4"), 2, "cluster.devices_per_node: auto: a job file asks for a number"),
        (("cluster.scheduler=slurm",), 2, "cluster.scheduler: 'slurm': bigtrain prints the job file and leaves it"),
        (("--render", "slurm", "train.device=cpu", "memory.budget=1MiB"), 3, "memory.budget: 1MiB is "),
    ],
)
def test_what_keeps_a_job_file_from_being_printed(words: tuple[str, ...], code: int, line: str) -> None:
    refused = run("launch", "quickstart_gpt", *words)
    assert (refused.returncode, refused.stdout) == (code, "")
    (said,) = refused.stderr.splitlines()
    assert said.startswith("error: ") and line in said


def test_a_sweep_as_json_and_as_a_picture(tmp_path: Path) -> None:
    argv = ("plan", "quickstart_gpt", "--device", "t4", "--sweep", "--json", "--png", tmp_path / "frontier.png")
    points = json.loads(run(*argv).stdout)
    assert points[-1]["choice"] is not None and points[-1]["tokens_per_second"] > 0
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--png", "x.png"), "--png: draws what --sweep or a range of --world-size finds; add one"),
        (("--sweep", "--output", "x.yaml"), "--output: --sweep is of many plans"),
        (("--device", "h10"), "--device: 'h10' is not one device of the table"),
        (("--device", "cpu", "train.device=cuda"), "train.device: 'cuda', but --device cpu is cpu"),
        (("--device", "t4", "--memory-budget", "24"), "memory.budget: 24 has no unit"),
        (("--device", "t4", "--memory-budget", "24GiB"), "memory.budget: 24.00 GiB is more than the "),
        (("--device", "t4", "--world-size", "3"), "train.global_batch_size: 8 is not divisible by 3 ranks"),
        (("--device", "t4", "--world-size", "16"), "; write train.global_batch_size=16, or use at most 8 ranks"),
        (("--device", "t4", "--world-size", "0"), "--world-size: '0' is no number of ranks"),
        (("--device", "t4", "--world-size", "8..4"), "--world-size: '8..4' is no number of ranks"),
        (("--device", "t4", "--world-size", "16..64"), "train.global_batch_size: 8 is not divisible by 16 ranks"),
        (("--world-size", "1..8", "--sweep"), "--sweep: is of one world size"),
        (("--world-size", "1..8", "--output", "plan.yaml"), "--output: a range of --world-size is of many plans"),
        (("--png", "plan.png"), "--png: draws what --sweep or a range of --world-size finds"),
        (("--device", "t4", "sharding.offload=nvme"), "sharding.offload: 'nvme' is DeepSpeed's"),
    ],
)
def test_wrong_flags_of_a_plan(flags: tuple[str, ...], line: str) -> None:
    refused = run("plan", "quickstart_gpt", *flags)
    assert refused.returncode == 2 and refused.stdout == ""
    (said,) = refused.stderr.splitlines()
    assert said.startswith("error: ") and line in said


def test_a_range_of_ranks_is_a_table(tmp_path: Path) -> None:
    picture = tmp_path / "scaling.png"
    shown = run("plan", "quickstart_gpt", "--device", "t4", "--world-size", "2..16", "--png", picture)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["ranks", "2", "4", "8", "16", "predicted;"]
    assert "8 rows for 16 ranks are less than one for each" in shown.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    listed = json.loads(run("plan", "quickstart_gpt", "--device", "t4", "--world-size", "2..16", "--json").stdout)
    assert [one["world_size"] for one in listed] == [2, 4, 8, 16]
    assert listed[0]["efficiency"] == 1 and listed[-1]["choice"] is None


def test_a_profile_says_what_the_plan_says(tmp_path: Path) -> None:
    edits = ("train.device=cpu", "model.hidden_size=64", "data.sequence_length=64", "train.compile=false")
    planned = json.loads(run("plan", "quickstart_gpt", *edits, "--json").stdout)
    told = run("profile", "quickstart_gpt", *edits, "--json", "--html", tmp_path / "p.html").stdout
    found = json.loads(told[told.index("{") :])
    assert found["predicted"] == planned["memory"]
    measured = found["measured"]["allocated_bytes_peak"]
    assert abs(planned["memory"]["allocated_bytes_peak"] / measured - 1) < 0.005
    assert "<svg" in (tmp_path / "p.html").read_text()


def test_a_profile_of_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[bool] = []

    class Found:
        def lines(self) -> list[str]:
            return ["a step takes 1 ms"]

    def profiled(_: object, *, of_time: bool) -> Found:
        asked.append(of_time)
        return Found()

    monkeypatch.setattr("bigtrain.profiling.output.profiled", profiled)
    monkeypatch.setattr("bigtrain.launcher.adopt_environment", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["bigtrain", "profile", "quickstart_gpt", "train.device=cpu", "--time"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert asked == [True]
    assert "a step takes 1 ms\n" in capsys.readouterr().out


BAD = {
    "train.micro_batchsize=4": "micro_batch_size",
    "memory.budget=24": "GiB",
    "train.global_batch_size=eight": "global_batch_size",
    "model.num_attention_heads=5": "num_attention_heads",
    "train.masking_probability=1.5": "masking_probability",
    "data.source=no/such/folder": "no/such/folder",
    "optimizer.name=lam": "lamb",
    "train.device=tpu": "cuda",
    "recompute.policy=ful": "full",
    "data.sequence_length=128 model.max_position_embeddings=64": "max_position_embeddings",
    "optimizer.warmup_steps=9000": "warmup_steps",
    "nonsense": "key=value",
    "logging.trackers=[tensorboard,aim]": "pip install aim",  # which is on no machine of ours: it does not build
    "cluster.devices_per_node=2 train.global_batch_size=7 train.micro_batch_size=1": "global_batch_size",
}


ONE = "train.device=cpu train.global_batch_size=8 train.micro_batch_size=8"
FREE = f"{ONE} train.max_grad_norm=null"
BAD_MECHANISMS = {
    "train.device=cpu amp.precision=fp16": "amp.precision: fp16 does not run on the CPU; it can fp32 and bf16",
    "train.device=cpu amp.precision=fp8": "amp.precision: fp8 does not run on the CPU; it can fp32 and bf16",
    "train.device=cpu recompute.policy=offload": "recompute.policy: offload on the CPU: ",
    "recompute.policy=[full,none,full]": "recompute.policy: a list of 3 for 2 blocks",
    "amp.master_weights=split24": "amp.master_weights: split24 keeps weights in bf16, and amp.precision is fp32; use",
    "optimizer.name=adafactor optimizer.state=8bit": "optimizer.state: 8bit: adafactor keeps ",
    f"{ONE} optimizer.gradient_release=true": "optimizer.gradient_release: train.max_grad_norm: 1 clips by ",
    f"{FREE} train.micro_batch_size=2 optimizer.gradient_release=true": "optimizer.gradient_release: "
    "train.micro_batch_size: 4 micro-batches a step ",
    "train.device=cpu train.compile=true recompute.policy=selective": "recompute.policy: selective with train.compile",
}


@pytest.mark.parametrize("edits", BAD_MECHANISMS)
def test_mechanisms_that_do_not_go_together_are_one_line_and_exit_2(tmp_path: Path, edits: str) -> None:
    refused = run("launch", "quickstart_bert", *edits.split(), "--run-dir", tmp_path / "run")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith(f"error: command line: {BAD_MECHANISMS[edits]}")
    assert not (tmp_path / "run").exists()


def test_mechanisms_that_go_together_are_planned() -> None:
    lean = "amp.precision=bf16 amp.master_weights=split24 optimizer.name=muon optimizer.state=8bit"
    planned = run("plan", "quickstart_bert", *FREE.split(), *lean.split(), "optimizer.gradient_release=true")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert "master_weights" in planned.stdout
    assert "gradients released as they come" in planned.stdout


def test_a_rate_too_small_for_bf16_weights_is_a_warning_with_the_number() -> None:
    edits = ("amp.precision=bf16", "amp.master_weights=none", "optimizer.learning_rate=1e-5", "train.device=cpu")
    planned = run("plan", "quickstart_bert", *edits)
    assert planned.returncode == 0
    (line,) = [line for line in planned.stdout.splitlines() if "learning rate of 1e-05" in line]
    assert planned.stdout.count("warning ") == 1
    assert "those of size 0.08 are 0.00049 apart, so it takes at least 0.00024" in line


@pytest.mark.parametrize("edits", BAD)
def test_wrong_input_is_one_line_and_exit_2(tmp_path: Path, edits: str) -> None:
    refused = run("launch", "quickstart_bert", *edits.split(), "--run-dir", tmp_path / "run")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith("error: command line: ")
    assert BAD[edits] in refused.stderr
    assert not (tmp_path / "run").exists()


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("model: {family: brt}\ntrain: {objective: mlm, stps: 5}\noptimizer: {learning_rate: fast}\n")
    refused = run("launch", recipe)
    lines = refused.stderr.splitlines()
    assert refused.returncode == 2
    assert [line.split(": ")[1].removeprefix(str(tmp_path)) for line in lines] == [
        "/bad.yaml:1",
        "/bad.yaml:2",
        "/bad.yaml:3",
    ]


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["launch"], "RECIPE"),
        (["nonsense"], "nonsense"),
        (["generate", "x"], "--prompt"),
        (["plan", "x", "--nosuch"], "--nosuch"),
        (["launch", "no_such.yaml"], "no such file"),
        (["generate", "no/run", "--prompt", "x"], "no/run"),
        (["eval", "no/run"], "no/run"),
        (["plan", "bert_base", "train.device=cpu", "--output", "/nonexistent/p.yaml"], "/nonexistent/p.yaml"),
        (["recipes", "copy", "bert_base", "/nonexistent/x.yaml"], "/nonexistent/x.yaml"),
        (["launch", "quickstart_bert", "--run-dir", "/dev/null"], "--run-dir"),
        (["launch", "quickstart_bert", "--allow", "optimizer.lr"], "--allow"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(argv: list[str], word: str) -> None:
    refused = run(*argv)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith("error: ")
    assert word in refused.stderr


def test_prepare_launch_eval_generate(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    prepared = run("prepare", tiny_recipes["bert"])
    assert prepared.returncode == 0
    assert "tokens to train on" in prepared.stdout
    launched = run("launch", tiny_recipes["bert"], "train.steps=3", "--run-dir", folder)
    assert launched.returncode == 0, launched.stderr
    assert launched.stderr == ""
    assert "bigtrain generate" in launched.stdout
    evaluated = json.loads(run("eval", folder).stdout)
    assert evaluated["step"] == 3
    filled = run("generate", folder, "--prompt", "red [MASK] blue")
    assert filled.stdout.startswith("[MASK] 1: ")
    refused = run("generate", folder, "--prompt", "no mask here")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)


def test_a_lean_run_is_launched_evaluated_and_asked(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lean = (
        *("amp.precision=bf16", "amp.master_weights=split24", "optimizer.state=8bit"),
        *("optimizer.gradient_release=true", "train.max_grad_norm=null", "train.micro_batch_size=8"),
    )
    launched = run("launch", tiny_recipes["gpt"], *lean, "train.steps=3", "--run-dir", folder)
    assert launched.returncode == 0, launched.stderr
    assert json.loads(run("eval", folder).stdout)["step"] == 3
    asked = run("generate", folder, "--prompt", "red green")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("red green")


def test_the_public_names_are_there() -> None:
    for name in bigtrain.__all__:
        assert getattr(bigtrain, name) is not None
    assert set(bigtrain.__all__) <= set(dir(bigtrain))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = bigtrain.nonsense
