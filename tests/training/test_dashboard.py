"""Real trackers that need no network: mlflow into files, wandb offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trained import losses, train

from bigtrain.training import tracking
from bigtrain.training.dashboard import KnownRuns, Story, flat, open_dashboard

KEY = "0123456789abcdef" * 2 + "01234567"
"""Of the form of an API key."""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_DIR", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 400.0)  # to import them takes long where all is busy
    yield
    import mlflow
    import wandb

    wandb.teardown()
    mlflow.set_tracking_uri(None)


def mlflow_run(folder: Path) -> tuple[Any, dict[int, float]]:
    """Return the one run that mlflow has in a run folder, and its losses by step."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlruns").as_uri())
    experiments = [one for one in client.search_experiments() if one.name != "Default"]
    (run,) = client.search_runs([one.experiment_id for one in experiments])
    history = client.get_metric_history(run.info.run_id, "loss")
    return run, {entry.step: entry.value for entry in history}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("offline")
def test_a_run_and_its_resume_are_one_run_of_each_tracker(
    tiny_recipes: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, wanted = tmp_path / "mine", "logging.trackers=[tensorboard, mlflow, wandb]"
    train(tiny_recipes["gpt"], folder, wanted, "train.steps=2")
    known = json.loads((folder / "trackers.json").read_text())
    rows = train(tiny_recipes["gpt"], folder, wanted, "train.steps=4")
    assert json.loads((folder / "trackers.json").read_text()) == known
    assert set(known) == {"mlflow", "wandb"}
    run, drawn = mlflow_run(folder)
    assert run.info.run_id == known["mlflow"]
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert drawn == losses(rows) and len(drawn) == 4
    assert run.data.params["model.hidden_size"] == "32"
    assert run.data.params["train.micro_batch_size"] == "4"
    kept = [file.read_bytes() for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"))]
    assert [file.name.rpartition("-")[2] for file in (folder / "wandb").glob("offline-run-*")] == [known["wandb"]] * 2
    for loss in drawn.values():  # its records are not compressed, and hold JSON
        assert any(repr(loss).encode() in content for content in kept)
    assert any(b"model.hidden_size" in content for content in kept)
    holders = [file for file in folder.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    assert not holders
    assert "warning:" not in capfd.readouterr().err


class Gone:
    """What Accelerate has for a tracker; runs that it had before are gone."""

    started: list[dict[str, Any]] = []  # noqa: RUF012
    known: frozenset[str] = frozenset()

    def __init__(self, project: str, **options: Any) -> None:
        self.project, self.options = project, options
        self.tracker = type("Run", (), {"hash": options.get("run_hash") or "fresh"})()
        self.config: dict[str, Any] | None = None

    def start(self) -> None:
        Gone.started.append(self.options)
        if "run_hash" in self.options and self.options["run_hash"] not in Gone.known:
            raise KeyError(self.options["run_hash"])

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values


def test_a_run_that_the_tracker_has_no_more_is_begun_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate import tracking as accelerate_tracking

    monkeypatch.setattr(accelerate_tracking, "logger", accelerate_tracking.logger)
    monkeypatch.setattr(Gone, "started", [])
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "aim", Gone)
    KnownRuns(tmp_path / "trackers.json").keep("aim", "lost")
    opened = open_dashboard("aim", Story("p", "r", tmp_path, {"a.b": 1}))
    place = {"logging_dir": str(tmp_path)}
    assert Gone.started == [{**place, "run_hash": "lost"}, place]
    assert opened.config == {"a.b": 1}
    assert KnownRuns(tmp_path / "trackers.json").get("aim") == "fresh"


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("comet", "comet_ml", {"experiment_key": "0" * 32}),
        ("swanlab", "swanlab", {"id": "0" * 32, "experiment_name": "r", "resume": "allow"}),
        ("trackio", "trackio", {"name": "r", "resume": "allow"}),
    ],
)
def test_what_others_are_started_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, kind: str, options: dict[str, Any]
) -> None:
    from accelerate import tracking as accelerate_tracking

    monkeypatch.setattr(accelerate_tracking, "logger", accelerate_tracking.logger)
    monkeypatch.setattr(Gone, "started", [])
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, kind, Gone)
    KnownRuns(tmp_path / "trackers.json").keep(name, "0" * 32)
    assert open_dashboard(name, Story("p", "r", tmp_path, {})).project == "p"
    assert Gone.started == [options]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"wandb": 3}'])
def test_a_damaged_file_holds_no_run(tmp_path: Path, text: str) -> None:
    file = tmp_path / "trackers.json"
    file.write_text(text)
    runs = KnownRuns(file)
    assert runs.get("wandb") is None
    runs.keep("wandb", "abc")
    runs.keep("mlflow", "def")
    assert json.loads(file.read_text()) == {"mlflow": "def", "wandb": "abc"}


def test_a_configuration_is_flat() -> None:
    nested = {"name": "x", "train": {"steps": 3, "tokens": None}, "optimizer": {"betas": [0.9, 0.95], "on": True}}
    assert flat(nested) == {
        "name": "x", "train.steps": 3, "train.tokens": None, "optimizer.betas": "[0.9, 0.95]", "optimizer.on": True,
    }  # fmt: skip
