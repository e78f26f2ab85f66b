from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigtrain.data.decoding import Meter
from bigtrain.data.readers import read_documents
from bigtrain.data.tables import BATCH_ROWS, table_texts
from bigtrain.errors import DataError

TEXTS = [f"text {number}" for number in range(2 * BATCH_ROWS + 3)]


def write(path: Path, table: pa.Table) -> Path:
    if path.name.startswith("file"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        pq.write_table(table, path, row_group_size=200)
    return path


def read(path: Path, column: str = "text") -> list[str]:
    return list(read_documents(path, column, Meter()))


NAMES = pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])


@NAMES
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_texts(tmp_path: Path, name: str, kind: Any) -> None:
    column = pa.chunked_array([pa.array(TEXTS)]).cast(kind)
    table = pa.table({"id": range(len(TEXTS)), "text": column})
    assert read(write(tmp_path / name, table)) == TEXTS


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_compressed(tmp_path: Path, name: str) -> None:
    whole = write(tmp_path / name, pa.table({"text": TEXTS})).read_bytes()
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(whole))
    (tmp_path / f"{name}.zst").write_bytes(pa.compress(whole, codec="zstd", asbytes=True))
    assert read(tmp_path / f"{name}.gz") == read(tmp_path / f"{name}.zst") == TEXTS


def test_what_datasets_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": TEXTS})
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "a.parquet") == TEXTS
    assert read(next((tmp_path / "saved").glob("*.arrow"))) == TEXTS


@NAMES
@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (
            pa.table({"id": [1], "body": ["a"]}),
            "data.text_column: no column 'text'; there are: id, body; name another one as data.text_column",
        ),
        (
            pa.table({"text": [1, 2]}),
            "data.text_column: column 'text' holds int64, not text; name another one as data.text_column",
        ),
        (
            pa.table({"text": ["a"] * 600 + [None]}),
            "data.text_column: column 'text' holds null in row 601; name another column, or leave the row out",
        ),
        (pa.table({"text": pa.array([], pa.string())}), "data.source: the file holds no text; leave it out"),
    ],
)
def test_faults(tmp_path: Path, name: str, table: pa.Table, fault: str) -> None:
    path = write(tmp_path / name, table)
    with pytest.raises(DataError) as raised:
        read(path)
    assert str(raised.value) == f"{path}: {fault}"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize(
    "content", [b"no table at all, but long enough to be read", b"PAR1", b"ARROW1\0\0", b"\xff" * 40]
)
def test_no_table(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        read(tmp_path / name)
    assert str(raised.value).startswith(f"{tmp_path / name}: data.source: cannot be read as .")
    assert "\n" not in str(raised.value)


@NAMES
def test_truncated(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, pa.table({"text": TEXTS}))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match="cannot be read as"):
        read(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    wrong = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")]
    )
    path = write(tmp_path / "file.arrow", pa.table({"text": wrong}))
    with pytest.raises(DataError, match=r"cannot be read as .arrow"):
        list(table_texts(path, ".arrow", "text", Meter()))
