"""Texts out of Parquet and Arrow files, a batch of rows at a time, through pyarrow."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from bigtrain.data.decoding import CHUNK_BYTES, COMPRESSIONS, Meter, byte_chunks, data_error
from bigtrain.data.readers import ANOTHER_COLUMN, ANOTHER_ROW, TEXT_COLUMN, texts_in

BATCH_ROWS = 256
MOST_UNPACKED = 100
"""Times; a table of text packs to a tenth or so, and what unpacks to more would fill the disk."""


def table_texts(path: Path, chosen: str, column: str, meter: Meter) -> Iterator[str]:
    """Yield the texts of one column; `chosen` is .parquet or .arrow (both Arrow forms: file and stream).

    Raises DataError when the file is broken, has no such column, or a row holds no text there.
    """
    rows = 0
    try:
        with _seekable(path, meter) as file:
            for schema, batch in _parquet(file, column) if chosen == ".parquet" else _arrow(file):
                _check_column(path, schema, column)
                if batch is None:
                    continue
                values = batch.column(schema.get_field_index(column))
                if values.null_count:
                    first = rows + values.is_null().index(True).as_py() + 1
                    what = f"column {column!r} holds null in row {first}; {ANOTHER_ROW}"
                    raise data_error(str(path), what, TEXT_COLUMN)
                rows += len(values)
                yield from values.to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, UnicodeDecodeError) as error:
        what = f"cannot be read as {chosen}: {str(error).splitlines()[0]}; fetch or write it again"
        raise data_error(str(path), what) from error


def _parquet(file: IO[bytes], column: str) -> Iterator[tuple[Any, Any]]:
    # A buffer size makes pyarrow read a column in pieces instead of a whole row group.
    table = pyarrow.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
    yield table.schema_arrow, None
    for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=[column], use_threads=False):
        yield batch.schema, batch


def _arrow(file: IO[bytes]) -> Iterator[tuple[Any, Any]]:
    if file.read(6) == b"ARROW1":
        table = pyarrow.ipc.open_file(file)
        batches = (table.get_batch(number) for number in range(table.num_record_batches))
    else:
        file.seek(0)
        table = batches = pyarrow.ipc.open_stream(file)
    yield table.schema, None
    for batch in batches:
        yield batch.schema, batch


def _check_column(path: Path, schema: Any, column: str) -> None:
    if column not in schema.names:
        names = ", ".join(schema.names)
        raise data_error(
            str(path), f"no column {column!r}; there are: {names or 'none'}; {ANOTHER_COLUMN}", TEXT_COLUMN
        )
    found = schema.field(column).type
    if not _is_text(found):
        texts = texts_in([field.name for field in schema if _is_text(field.type)])
        raise data_error(str(path), f"column {column!r} holds {found}, not text{texts}; {ANOTHER_COLUMN}", TEXT_COLUMN)


def _is_text(kind: Any) -> bool:
    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held))


@contextmanager
def _seekable(path: Path, meter: Meter) -> Iterator[IO[bytes]]:
    if not path.name.lower().endswith(COMPRESSIONS):
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        packed = path.stat().st_size
        for chunk in byte_chunks(path, meter):
            file.write(chunk)
            if file.tell() > MOST_UNPACKED * packed + CHUNK_BYTES:
                raise data_error(str(path), f"unpacks to more than {MOST_UNPACKED} times its size; unpack it yourself")
        file.seek(0)
        yield file
