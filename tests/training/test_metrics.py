"""metrics.jsonl: every number JSON, cut where the run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bigtrain.training.metrics import METRICS_FILE, MetricsLog, cut_after, jsonable, read_metrics


def log_of(folder: Path, step: int = 0) -> MetricsLog:
    return MetricsLog(folder, step=step, trackers=[])


def test_rows_come_back_bit_by_bit(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    loss = 1 / 3 + 1e-16
    log.write({"step": 1, "loss": loss, "allocated_bytes_peak": None})
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": loss, "allocated_bytes_peak": None}]


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_what_json_cannot_hold_becomes_text(tmp_path: Path, value: float, text: str) -> None:
    log = log_of(tmp_path)
    log.write({"step": 1, "loss": value})
    log.close()
    line = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["loss"] == text
    assert jsonable(1.5) == 1.5


def test_later_rows_and_a_torn_line_are_cut(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    for step in range(1, 8):
        log.write({"step": step, "loss": 1.0})
    log.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "lo')
    log = log_of(tmp_path, step=5)
    log.write({"step": 6, "loss": 2.0})
    log.close()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] == 2.0


def test_a_torn_line_is_not_read(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_no_file_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    cut_after(tmp_path / METRICS_FILE, 3)
    assert not (tmp_path / METRICS_FILE).exists()


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, step=0, trackers=["tensorboard"])
    log.write({"step": 3, "loss": 1.5, "skipped": 0, "loss_text": "nan"})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "skipped"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 1.5)]


@pytest.mark.parametrize("line", [b"\0" * 40, b"[1]", b'"text"', b"{}", b"7", b"\xff\xfe"])
def test_a_line_that_is_no_row_ends_what_is_read(tmp_path: Path, line: bytes) -> None:
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    assert read_metrics(tmp_path) == [{"step": 1}]
    cut_after(tmp_path / METRICS_FILE, 9)
    assert (tmp_path / METRICS_FILE).read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("line", ['"step"', '{"step": "2"}', '{"step": 2, "a": [1]}', "[" * 100_000, '{"step": 1e999}'])
def test_what_is_no_row_ends_the_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    cut_after(path, 9)
    assert path.read_text() == '{"step": 1}\n'
