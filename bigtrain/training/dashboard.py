"""One dashboard besides TensorBoard, opened through Accelerate's tracking in the run that it has of this one."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from bigtrain import strict_json, terminal
from bigtrain.config.trackers import MODULES
from bigtrain.data.cache import write_json
from bigtrain.planner.plan import Plan

RUNS_FILE = "trackers.json"
"""What each tracker calls this run, so that it goes on in the same one. Nothing that gives access to it."""

CHOSEN = {"wandb": ("id", 8), "swanlab": ("id", 21), "comet": ("experiment_key", 32)}
"""Trackers that are told what to call the run: by which argument, and how many letters and digits they take."""

MLFLOW_STORE = "MLFLOW_TRACKING_URI"
MLFLOW_FILES = "MLFLOW_ALLOW_FILE_STORE"
"""Environment variables of mlflow: where it writes, and that a folder is as good as a database."""


class Story(NamedTuple):
    """What trackers are told of a run: its project's name, its own, its folder, its configuration by dotted keys."""

    project: str
    run: str
    folder: Path
    config: Mapping[str, Any]


def story_of(plan: Plan, folder: Path) -> Story:
    """Return what trackers are told of a plan's run in a folder."""
    config = {"parameters": plan.parameters, "device": plan.hardware.name, "ranks": plan.world_size}
    return Story(plan.recipe.name, folder.resolve().name, folder, {**config, **flat(plan.recipe.model_dump())})


def open_dashboard(name: str, story: Story) -> Any:
    """Return Accelerate's tracker of that name, in the run that it has of this one, or else in a new one."""
    known = KnownRuns(story.folder / RUNS_FILE)
    before, tracker = known.get(name), None
    if before is not None and name not in CHOSEN:
        with suppress(Exception):  # that run may be gone, or the tracker may write elsewhere now
            tracker = _open(name, story, before, known)
    goes_on = tracker is not None
    if tracker is None:
        tracker = _open(name, story, before if name in CHOSEN else None, known)
    if not (goes_on and name == "mlflow"):  # which lets no parameter change
        tracker.store_init_configuration(dict(story.config))
    return tracker


def _open(name: str, story: Story, before: str | None, known: KnownRuns) -> Any:
    from accelerate import tracking

    # Accelerate's own makes its state first, and for that joins a process group by the environment.
    tracking.logger = _Plain(logging.getLogger(tracking.__name__), {})
    options = _options(name, story, before)
    tracker: Any = tracking.LOGGER_TYPE_TO_CLASS[MODULES.get(name, name)](story.project, **options)
    tracker.main_process_only = False  # only one process has trackers at all
    tracker.start()
    if (own := _own_name(name, tracker, options)) is not None:
        known.keep(name, own)
    return tracker


def _options(name: str, story: Story, before: str | None) -> dict[str, Any]:
    """Return what a tracker is started with besides the project; where it can be told, its own name of the run."""
    key, length = CHOSEN.get(name, ("", 0))
    chosen = {key: before or uuid.uuid4().hex[:length]} if key else {}
    match name:
        case "wandb":
            settings = {"console": "off", "quiet": True, "silent": terminal.is_quiet()}
            place = {} if "WANDB_DIR" in os.environ else {"dir": str(story.folder)}
            return {**chosen, "name": story.run, "resume": "allow", "settings": settings, **place}
        case "swanlab":
            return {**chosen, "experiment_name": story.run, "resume": "allow"}
        case "comet":
            return chosen
        case "mlflow":
            _place_mlflow(story.folder)
            return {"run_name": story.run, "run_id": before}
        case "aim":
            return {"logging_dir": str(story.folder), **({"run_hash": before} if before else {})}
    return {"name": story.run, "resume": "allow"}


def _place_mlflow(folder: Path) -> None:
    """Let mlflow write where its user says, else as it does by itself, and where it cannot, into the run folder."""
    import mlflow

    said = os.environ.get(MLFLOW_STORE)
    if said is None and find_spec("sqlalchemy") is None:  # its small form has no database
        said = (folder.absolute() / "mlruns").as_uri()
        mlflow.set_tracking_uri(said)
    if said is not None and (said.startswith("file:") or "://" not in said):
        os.environ.setdefault(MLFLOW_FILES, "true")


def _own_name(name: str, tracker: Any, options: Mapping[str, Any]) -> str | None:
    """Return what a tracker calls the run; None where it finds a run by the name that it was given."""
    if name in CHOSEN:
        return str(options[CHOSEN[name][0]])
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    return str(tracker.tracker.hash) if name == "aim" else None


class KnownRuns:
    """What each tracker calls this run, in a file; trackers ask from several threads."""

    _lock = Lock()

    def __init__(self, file: Path) -> None:
        self._file = file

    def get(self, tracker: str) -> str | None:
        """Return a tracker's name of the run; None where there is none yet, or the file is gone or damaged."""
        return self._read().get(tracker)

    def keep(self, tracker: str, run: str) -> None:
        """Remember what a tracker calls the run."""
        with KnownRuns._lock:
            found = self._read()
            if found.get(tracker) != run:
                write_json(self._file, {**found, tracker: run})

    def _read(self) -> dict[str, str]:
        try:
            found = strict_json.read(self._file)
        except (OSError, ValueError):
            return {}
        pairs = found.items() if isinstance(found, dict) else ()
        return {name: run for name, run in pairs if isinstance(run, str)}


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys dotted; what is no number, text or None becomes text: all that each tracker can hold."""
    leaves: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
    return leaves


class _Plain(logging.LoggerAdapter[logging.Logger]):
    """A logger as Accelerate's trackers use theirs."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave out what only Accelerate's own understands."""
        kwargs.pop("main_process_only", None)
        return msg, kwargs

    def warning_once(self, text: str) -> None:
        """Say what cannot be written, to those who look for it."""
        self.debug(text)
