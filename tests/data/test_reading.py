from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigtrain.config.schema import DataSection
from bigtrain.data import hub, readers
from bigtrain.data.decoding import Meter
from bigtrain.data.reading import START, Mark, Reading, is_streamed, mark_of
from bigtrain.data.sources import documents

STREAMED = DataSection(source="user/set", streaming=True)


def write_lines(folder: Path) -> None:
    for number in range(3):
        rows = ({"id": row, "text": f"text {number} {row}"} for row in range(300))
        (folder / f"train-{number}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_tables(folder: Path) -> None:
    for number in range(2):
        table = pa.table({"text": [f"first {number} {row}\nsecond" for row in range(450)]})
        pq.write_table(table, folder / f"train-{number}.parquet", row_group_size=100)


@pytest.fixture
def hub_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], None]:
    """Let every hub id stand for a folder with what a function writes into it."""
    import datasets

    load = datasets.load_dataset

    def made(write: Callable[[Path], None]) -> None:
        write(tmp_path)
        monkeypatch.setattr(hub, "reachable", lambda: True)
        monkeypatch.setattr(datasets, "load_dataset", lambda _, *rest, **keys: load(str(tmp_path), *rest, **keys))

    return made


@pytest.mark.parametrize("write", [write_lines, write_tables])
def test_a_stream_goes_on_at_any_document(
    hub_of: Callable[..., None], monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    hub_of(write)
    monkeypatch.setattr(readers.cut_at_lines, "__defaults__", (12,))  # a row of a table gives two documents
    every = list(Reading(STREAMED))
    assert len(every) == (900 if write is write_lines else 1800)
    for count in (0, 1, 255, 257, 513, 901):
        reading = Reading(STREAMED)
        before = list(islice(reading, count))
        mark = mark_of(json.loads(json.dumps(reading.mark)))
        again = Reading(STREAMED, mark=mark)
        assert before + list(again) == every
        assert again.mark.rows >= mark.rows


def test_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    data = DataSection(source=str(tmp_path / "a.txt"), streaming=True)
    reading, meter = Reading(data), Meter()
    assert not is_streamed(data)
    assert next(iter(reading)) == "one" and reading.mark == Mark(1)
    assert list(Reading(data, "", meter, reading.mark)) == list(documents(data))[1:]
    assert meter.read_bytes == (tmp_path / "a.txt").stat().st_size


def test_what_is_streamed() -> None:
    assert is_streamed(STREAMED)
    assert not is_streamed(DataSection(source="user/set"))
    assert not is_streamed(DataSection(streaming=True))


def test_marks_are_json() -> None:
    assert mark_of(json.loads(json.dumps(START))) == START
    assert mark_of([3, 4, {"shard": 1}]) == Mark(3, 4, {"shard": 1})


@pytest.mark.parametrize("told", [[-1, 0, None], [0.5, 0, None], [True, 0, None], [0, 0, "x"], [0, 0, []]])
def test_no_mark(told: Any) -> None:
    with pytest.raises(ValueError, match="no mark"):
        mark_of(told)
