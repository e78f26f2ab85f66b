"""What a run writes down: metrics.jsonl always, TensorBoard if asked for."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Append rows to a run's metrics.jsonl, one JSON object a line, and to its trackers.

    Rows after `step` (of work that was lost when a run was killed) and a torn last line are cut first.
    """

    def __init__(self, run_dir: Path, *, step: int, trackers: list[str]) -> None:
        self._path = run_dir / METRICS_FILE
        cut_after(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(run_dir, step) if "tensorboard" in trackers else None

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row; a number that JSON has no form for is written as the text "nan" or "inf"."""
        self._file.write(json.dumps({key: jsonable(value) for key, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in row.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._tensorboard.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Bring everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def jsonable(value: Any) -> Any:
    """Return a value that JSON can hold: non-finite numbers become "nan", "inf" or "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run; a torn last line is left out."""
    path = run_dir / METRICS_FILE
    return [json.loads(line) for line in _whole_lines(path)] if path.is_file() else []


def cut_after(path: Path, step: int) -> None:
    """Drop a torn last line and the rows of later steps from a metrics file, by writing it anew and renaming."""
    if not path.is_file():
        return
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    aside.replace(path)


def _whole_lines(path: Path) -> list[str]:
    """Return the lines up to the first that is torn or no row, as a lost power supply can leave."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return list(itertools.takewhile(_is_row, text[: text.rfind("\n") + 1].splitlines()))


def _is_row(line: str) -> bool:
    try:
        return "step" in json.loads(line)
    except (ValueError, TypeError):
        return False


def _tensorboard(run_dir: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)
