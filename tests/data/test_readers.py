from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from bigtrain.data import readers
from bigtrain.data.decoding import Meter
from bigtrain.data.readers import FORMATS, cut_at_lines, file_format, json_type, read_documents, text_of
from bigtrain.errors import DataError


def read(path: Path, content: str | bytes, column: str = "text") -> list[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_documents(path, column, Meter()))


def fault(path: Path, content: str | bytes, column: str = "text") -> str:
    """Return the fault without the folder of the test."""
    with pytest.raises(DataError) as raised:
        read(path, content, column)
    assert "\n" not in str(raised.value)
    return str(raised.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("a.txt", ".txt"),
        ("A.TXT", ".txt"),
        ("a.json.gz", ".json"),
        ("b.jsonl.zst", ".jsonl"),
        ("c.md", None),
        ("gz", None),
    ],
)
def test_file_format(name: str, known: str | None) -> None:
    assert file_format(Path(name)) == known


def test_formats_are_those_of_the_interface() -> None:
    assert set(FORMATS) == {".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow"}


def test_text_ends_a_document_at_a_blank_line(tmp_path: Path) -> None:
    content = "\n\none\nstill one\n\ntwo\n \t \n\n  indented three\r\n\r\nfour\n\n\n"
    assert read(tmp_path / "a.txt", content) == ["one\nstill one", "two", "  indented three", "four"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1000])
def test_text_is_the_same_however_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("bigtrain.data.decoding.CHUNK_BYTES", chunk)
    content = "a\n\n \n b\nc\n\n\n\n\u00e9\u00e9\r\n\r\n\n d"
    assert read(tmp_path / "a.txt", content) == ["a", " b\nc", "\u00e9\u00e9", " d"]


def test_long_text_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 10)
    assert read(tmp_path / "a.txt", "aaaa\nbbb\nccccc\nddd") == ["aaaa\nbbb", "ccccc\nddd"]
    assert read(tmp_path / "b.txt", "x" * 25) == ["x" * 10, "x" * 10, "x" * 5]


def test_cut_at_lines() -> None:
    assert list(cut_at_lines("ab\ncd\nef", 5)) == ["ab\n", "cd\nef"]
    assert list(cut_at_lines("ab\ncd\nef", 6)) == ["ab\ncd\n", "ef"]
    assert list(cut_at_lines("abcdef", 4)) == ["abcd", "ef"]
    assert list(cut_at_lines("", 4)) == []
    assert list(cut_at_lines(" \n ", 4)) == []


def test_json_lines(tmp_path: Path) -> None:
    content = '{"text": "one", "id": 1}\n\n{"id": 2, "text": "two\\n\\nlines"}\r\n{"text": ""}\n'
    content += '{"text": "\u00e9 \\ud83d\\ude00"}'
    assert read(tmp_path / "a.jsonl", content) == ["one", "two\n\nlines", "\u00e9 \U0001f600"]
    assert read(tmp_path / "a.jsonl", '{"body": "x"}\n', "body") == ["x"]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["id", "text"], [1, "one, with a comma"], [2, 'two\n"lines"'], [3, ""], [4, "four"]]
        )
    assert list(read_documents(path, "text", Meter())) == ["one, with a comma", 'two\n"lines"', "four"]


def test_csv_with_a_large_field(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "text\n" + "x" * 300_000 + "\n") == ["x" * 300_000]


def test_compressed(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "one"}\n')) == ["one"]


def test_meter_ends_at_the_size_of_the_files(tmp_path: Path) -> None:
    meter = Meter()
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text")
        list(read_documents(tmp_path / name, "text", meter))
    assert meter.read_bytes == 18


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}') == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "", "a.txt: data.source: the file is empty"),
        ("a.txt", " \n\n", "a.txt: data.source: the file holds no text"),
        ("a.jsonl", '{"text": ""}\n', "a.jsonl: data.source: the file holds no text"),
        ("a.csv", "text\n", "a.csv: data.source: the file holds no text"),
        ("a.txt", b"one\n\ntwo\xfe", "a.txt: data.source: not UTF-8 text: byte 0xfe at offset 8"),
        ("a.txt", "one".encode("utf-16"), "a.txt: data.source: not UTF-8 text: byte 0xff at offset 0"),
        ("a.md", "one", "a.md: data.source: unknown file type; known are .txt .jsonl"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl:2: data.source: broken JSON: Expecting value at column 9"),
        ("a.jsonl", '\n{"text": "a"', "a.jsonl:2: data.source: broken JSON: "),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: data.source: broken JSON: nested too deeply"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "a.jsonl:2: data.source: a list stands where a JSON object"),
        ("a.jsonl", '{"id": 1, "body": "a"}\n', "a.jsonl:1: data.text_column: no column 'text'; there are: id, body"),
        ("a.jsonl", "{}\n", "a.jsonl:1: data.text_column: no column 'text'; there are: none"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": null}\n',
            "a.jsonl:2: data.text_column: column 'text' holds null, not text",
        ),
        ("a.jsonl", '{"text": 3}\n', "a.jsonl:1: data.text_column: column 'text' holds a number, not text"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "a.jsonl:1: data.text_column: column 'text' holds half of a surrogate"),
        ("a.csv", "id,body\n1,a\n", "a.csv:1: data.text_column: no column 'text'; there are: id, body"),
        ("a.csv", "id,text\n1,a\n2\n", "a.csv:3: data.text_column: the row has no column 'text'"),
        (
            "a.csv",
            "id,text\n1,a\n2,one, two, three\n",
            "a.csv:3: data.source: 4 fields in a table of 2 columns; quote text that holds a comma",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n{"id": ' + "1" * 5000 + "}\n",
            "a.jsonl:2: data.source: broken JSON: a number of too many digits; mend the line",
        ),
        ("a.csv", 'text\n"a"b\n', "a.csv:2: data.source: broken CSV: "),
        ("a.csv", 'text\n"a\n', "a.csv:2: data.source: broken CSV: unexpected end of data"),
    ],
)
def test_faults_name_the_place(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    assert fault(tmp_path / name, content).startswith(expected)


@pytest.mark.parametrize(
    ("name", "content", "instead"),
    [
        ("a.txt", "", "leave it out"),
        ("a.txt", b"\xfe", "save the file as UTF-8"),
        ("a.jsonl", "{", "mend the line, or leave it out"),
        ("a.jsonl", "[" * 100_000, "mend the line, or leave it out"),
        ("a.jsonl", '{"id": 1}', "name another column, or leave the row out"),
        ("a.jsonl", '{"text": null}', "name another column, or leave the row out"),
        ("a.jsonl", '{"text": "\\ud800"}', "write the whole character"),
        ("a.json", '[{"text": ]', "mend the file there"),
        ("a.csv", "id,text\n2\n", "name another column, or leave the row out"),
        ("a.csv", 'text\n"a\n', "mend the line, or leave it out"),
        ("a.txt.gz", b"plain", "fetch or compress it again"),
        ("a.parquet", b"plain", "fetch or write it again"),
    ],
)
def test_faults_end_with_what_to_do_instead(tmp_path: Path, name: str, content: str | bytes, instead: str) -> None:
    assert fault(tmp_path / name, content).endswith(f"; {instead}")


def test_documents_before_a_fault_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text"\n')
    documents = read_documents(path, "text", Meter())
    assert next(documents) == "one"
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        next(documents)


@pytest.mark.parametrize("value", [None, True, 1, 1.5, "a", [], {}])
def test_json_types_have_names(value: object) -> None:
    assert json_type(value) in {"null", "true or false", "a number", "a text", "a list", "an object"}
    assert json_type(json.loads(json.dumps(value))) == json_type(value)


def test_text_of() -> None:
    assert text_of({"text": "a"}, "text", "here") == "a"
    with pytest.raises(DataError, match=r"^here: data.source: a text stands where"):
        text_of("a", "text", "here")
