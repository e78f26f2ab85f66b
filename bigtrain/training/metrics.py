"""What a run writes down: metrics.jsonl always, TensorBoard and other trackers if asked for."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from bigtrain import strict_json
from bigtrain.config.trackers import TENSORBOARD
from bigtrain.training.tracking import Trackers

METRICS_FILE = "metrics.jsonl"

LONGEST_ROW = 2**16
"""Bytes; a row has some hundred."""


class MetricsLog:
    """Append rows to a run's metrics.jsonl, one JSON object a line, and to its trackers.

    Rows after `step` (of work that was lost when a run was killed) and a torn last line are cut first.
    """

    def __init__(self, run_dir: Path, *, step: int, trackers: list[str], others: Trackers | None = None) -> None:
        """Begin after a step; `others` are the trackers besides TensorBoard, and are closed with this."""
        self._run_dir, self._names, self._others = run_dir, trackers, others
        self._path = run_dir / METRICS_FILE
        self._refused = False
        self._open(step)

    def _open(self, step: int) -> None:
        cut_after(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(self._run_dir, step) if TENSORBOARD in self._names else None

    def go_back(self, step: int) -> None:
        """Go on after an earlier step: rows after it are cut. Other trackers keep them beside the new ones."""
        self._close_files()
        self._open(step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row; a number that JSON has no form for is written as the text "nan" or "inf".

        A disk that refuses it is told once, and does not end the run: rows wait in memory, a few kilobytes of them.
        """
        with self._told():
            self._append(row)
        if self._others is not None:
            self._others.write(row)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Show a text in TensorBoard, if that is asked for."""
        if self._tensorboard is not None:
            with self._told():
                self._tensorboard.add_text(tag, text, step)

    def _append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({key: jsonable(value) for key, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in row.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._tensorboard.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Bring everything to the disk, and the other trackers to their end."""
        self._close_files()
        if self._others is not None:
            self._others.close()

    def _close_files(self) -> None:
        with self._told():
            self._file.flush()
            os.fsync(self._file.fileno())
        with self._told():
            self._file.close()
        if self._tensorboard is not None:
            with self._told():
                self._tensorboard.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._refused:
                print(f"warning: {self._path}: {error.strerror or error}; rows may be lost", file=sys.stderr)
            self._refused = True


def jsonable(value: Any) -> Any:
    """Return a value that JSON can hold: non-finite numbers become "nan", "inf" or "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run; a torn last line is left out."""
    path = run_dir / METRICS_FILE
    return [row for _, row in _whole_rows(path)] if path.is_file() else []


def cut_after(path: Path, step: int) -> None:
    """Drop the rows of later steps and whatever follows a torn row from a metrics file; that needs no room on the disk.

    Steps only grow in it. A link that leads elsewhere is replaced by a file.
    """
    if not path.is_file():
        return
    kept = sum(len(line) for line, _ in takewhile(lambda found: found[1]["step"] <= step, _whole_rows(path)))
    if path.is_symlink():
        with path.open("rb") as file:
            content = file.read(kept)
        path.unlink()
        path.write_bytes(content)
    else:
        os.truncate(path, kept)


def _whole_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield lines and what they say, up to the first that is torn or no row, as a lost power supply can leave."""
    with path.open("rb") as file:
        while (line := file.readline(LONGEST_ROW)).endswith(b"\n") and (row := _row(line)) is not None:
            yield line, row


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = strict_json.parse(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return None if any(isinstance(value, (dict, list)) for value in row.values()) else row


def _tensorboard(run_dir: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)
