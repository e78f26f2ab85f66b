"""How a run saves: with a copy or without, of which run, and what it says of the disk."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trained import losses, train

import bigtrain
from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.lineage import LINEAGE
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.engine import Engine
from bigtrain.errors import CheckpointError, Interrupted, ResumeError
from bigtrain.memory.state import saved_bytes
from bigtrain.planner.hardware import of_name
from bigtrain.training import saving
from bigtrain.training.saving import copies_first, saving_lines
from bigtrain.world import ALONE


def planned(recipe: Path, *overrides: str, device: str | None = None) -> bigtrain.Plan:
    read = bigtrain.load_recipe(recipe, list(overrides))
    return bigtrain.plan(read) if device is None else bigtrain.plan(read, of_name(device))


def test_a_device_with_memory_of_its_own_copies(tiny_recipes: dict[str, Path]) -> None:
    cuda = ("train.device=cuda", "amp.precision=fp32")
    assert not copies_first(planned(tiny_recipes["gpt"]))
    assert copies_first(planned(tiny_recipes["gpt"], *cuda, device="a100-80gb"))
    assert not copies_first(planned(tiny_recipes["gpt"], *cuda, "checkpoint.asynchronous=false", device="a100-80gb"))


def test_the_copy_is_in_the_plan_of_the_host(tiny_recipes: dict[str, Path]) -> None:
    cuda = ("train.device=cuda", "amp.precision=fp32")
    copying = planned(tiny_recipes["gpt"], *cuda, device="a100-80gb")
    plain = planned(tiny_recipes["gpt"], *cuda, "checkpoint.asynchronous=false", device="a100-80gb")
    more = (copying.memory.host_bytes_peak or 0) - (plain.memory.host_bytes_peak or 0)
    assert more == saved_bytes(copying.recipe, copying.model) > 0


def test_what_is_said_before_the_first_step(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny_recipes["gpt"])
    streams = "checkpoints: on a CPU they are written without a copy, while training waits"
    assert saving_lines(plan, tmp_path) == [streams]
    assert saving_lines(planned(tiny_recipes["gpt"], "checkpoint.asynchronous=false"), tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**10))
    warning = saving_lines(plan, tmp_path)[1]
    assert warning.startswith(f"warning: {tmp_path}: 1.00 KiB are free, and two checkpoints take ")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("amp.precision=bf16", "amp.master_weights=split24", "optimizer.state=8bit"),
        ("optimizer.name=adafactor",),
        ("amp.precision=bf16", "sharding.offload=optimizer"),
        ("optimizer.name=muon", "amp.precision=bf16", "amp.master_weights=none"),
    ],
)
def test_a_checkpoint_is_as_large_as_predicted(
    tiny_recipes: dict[str, Path], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    short = ("train.steps=2", "train.eval_every=null", "optimizer.warmup_steps=1")
    train(tiny_recipes["bert"], tmp_path / "run", *short, *overrides)
    plan = planned(tiny_recipes["bert"], *short, *overrides)
    sizes = [file.stat().st_size - header_bytes(file) for file in (tmp_path / "run").rglob("step-*/*.safetensors")]
    assert sum(sizes) == saved_bytes(plan.recipe, plan.model)


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save on the CPU as on CUDA, slowly enough for steps to be taken meanwhile."""
    plain = CheckpointStore.save

    def save(store: CheckpointStore, *arguments: Any) -> Path:
        time.sleep(0.2)
        return plain(store, *arguments)

    monkeypatch.setattr(saving, "copies_first", lambda _: True)
    monkeypatch.setattr(CheckpointStore, "save", save)


@pytest.mark.usefixtures("copying")
def test_a_run_that_copies_goes_on_bit_by_bit(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    """A signal in the middle of a background save: that one comes to its end, and so does the one for the signal."""
    plain = Engine.step

    def signalled(engine: Engine, max_norm: float | None = 1.0) -> Any:
        if engine.steps_taken == 5:  # step 5 is being written
            signal.raise_signal(signal.SIGTERM)
        return plain(engine, max_norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", signalled)
        with pytest.raises(Interrupted, match="SIGTERM: saved step 6"):
            train(tiny_recipes["bert"], tmp_path / "run")
    assert [manifest.step_of(folder) for folder in manifest.step_folders(tmp_path / "run")] == [6, 5]
    rows = train(tiny_recipes["bert"], tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "copies_first", lambda _: False)
        assert losses(rows) == losses(train(tiny_recipes["bert"], tmp_path / "whole"))
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    found = manifest.read(tmp_path / "run" / "step-00000012")
    assert (len(found["recipe"]), bool(found["data"]), found["world_size"]) == (64, True, 1)


def same_weights(one: Path, other: Path) -> bool:
    names = ("weights.safetensors", "optimizer.safetensors")
    digests = [
        [manifest.read(run / "step-00000012")["files"][name]["sha256"] for name in names] for run in (one, other)
    ]
    return digests[0] == digests[1]


def test_a_checkpoint_of_another_run_is_passed_over(
    tiny_recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("train.steps=5", "train.eval_every=null")
    train(tiny_recipes["gpt"], tmp_path / "run", *short)
    train(tiny_recipes["gpt"], tmp_path / "other", "train.steps=6", "train.eval_every=null", "seed=7")
    shutil.copytree(tmp_path / "other" / "step-00000006", tmp_path / "run" / "step-00000006")
    rows = train(tiny_recipes["gpt"], tmp_path / "run", "train.steps=8", "train.eval_every=null")
    assert "step-00000006: of another run" in capsys.readouterr().err
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert (tmp_path / "run" / "bad-step-00000006-0").is_dir()  # somebody's: out of the way, and not ours to remove
    shutil.copytree(tmp_path / "other" / "step-00000006", tmp_path / "run" / "step-00000006")
    shutil.rmtree(tmp_path / "run" / "step-00000005")
    shutil.rmtree(tmp_path / "run" / "step-00000008")
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints verifies"):
        train(tiny_recipes["gpt"], tmp_path / "run", "train.steps=8", "train.eval_every=null")


def test_a_run_that_went_on_with_another_recipe_keeps_its_checkpoints(
    tiny_recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny_recipes["gpt"], run, "train.steps=5", "train.eval_every=null")
    changed = ("train.steps=6", "train.eval_every=null", "train.dropout=0")
    with pytest.raises(ResumeError):
        train(tiny_recipes["gpt"], run, *changed)
    bigtrain.train(planned(tiny_recipes["gpt"], *changed), run, allowed=["train.dropout"])
    assert len(json.loads((run / LINEAGE).read_text())) == 2
    (run / "step-00000006" / "state.json").unlink()
    capsys.readouterr()
    assert len(train(tiny_recipes["gpt"], run, *changed)) == 6  # from step 5, of the recipe before
    assert "passed over: " in capsys.readouterr().err
    assert CheckpointStore(run, world=ALONE).newest() == run / "step-00000006"
