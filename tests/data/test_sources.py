from __future__ import annotations

import gzip
import json
import os
import platform
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigtrain.config.schema import DataSection
from bigtrain.data import sources
from bigtrain.data.decoding import Meter
from bigtrain.data.embedded import embedded_documents
from bigtrain.data.sources import documents, hub_name, identity, sample, source_files, total_bytes
from bigtrain.errors import DataError

ORIGIN = "recipe.yaml:6"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with a file of each kind, each of one document, and files that are none of the data."""
    folder = tmp_path / "mixed"
    (folder / "deeper").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "a.txt").write_text("text a")
    (folder / "b.jsonl").write_text(json.dumps({"text": "text b"}))
    (folder / "c.json").write_text(json.dumps([{"text": "text c"}]))
    (folder / "d.csv").write_text("text\ntext d\n")
    pq.write_table(pa.table({"text": ["text e"]}), folder / "deeper" / "e.parquet")
    with pa.ipc.new_stream(str(folder / "deeper" / "f.arrow"), pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": ["text f"]}))
    (folder / "g.txt.gz").write_bytes(gzip.compress(b"text g"))
    for name in ("README.md", ".hidden/h.txt", ".i.txt", "dataset_info.json", "state.json"):
        (folder / name).write_text("{}")
    return folder


def test_mixed_folder(mixed: Path) -> None:
    data = DataSection(source=str(mixed))
    assert list(documents(data)) == [f"text {letter}" for letter in "abcdefg"]
    assert total_bytes(data) == sum(file.stat().st_size for file in source_files(data))


def test_list_of_files_keeps_its_order(mixed: Path) -> None:
    data = DataSection(source=[str(mixed / "d.csv"), str(mixed / "a.txt"), str(mixed / "deeper")])
    assert list(documents(data)) == ["text d", "text a", "text e", "text f"]


def test_meter_is_that_of_the_caller(mixed: Path) -> None:
    data, meter = DataSection(source=str(mixed)), Meter()
    list(documents(data, meter=meter))
    assert meter.read_bytes == total_bytes(data)


def test_relative_and_home_paths(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mixed.parent)
    monkeypatch.setenv("HOME", str(mixed))
    assert source_files(DataSection(source="mixed")) == source_files(DataSection(source=str(mixed)))
    assert list(documents(DataSection(source="~/a.txt"))) == ["text a"]


def test_embedded() -> None:
    data = DataSection(source="embedded")
    assert list(islice(documents(data), 5)) == list(islice(embedded_documents(), 5))
    assert total_bytes(data) is None
    assert hub_name(data) is None


@pytest.mark.parametrize("text", ["./x", "../x", "/x", "~/x", "no/such/folder", "corpus.txt", "data/corpus.jsonl.gz"])
def test_paths_are_told_from_their_look(text: str) -> None:
    assert hub_name(DataSection(source=text)) is None


@pytest.mark.parametrize("text", ["wikitext", "allenai/c4", "openwebtext", "user/data-1.0"])
def test_hub_ids_are_told_from_their_look(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_name(DataSection(source=text)) == text
    monkeypatch.chdir(tmp_path)
    (tmp_path / text).mkdir(parents=True)
    assert hub_name(DataSection(source=text)) is None


def test_home_of_an_unknown_user_is_an_absent_path() -> None:
    with pytest.raises(DataError, match="no such file or folder: ~nobodyofthisname/a"):
        source_files(DataSection(source="~nobodyofthisname/a"))


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("no/such/folder", f"{ORIGIN}: data.source: no such file or folder: no/such/folder"),
        ("absent.txt", f"{ORIGIN}: data.source: no such file or folder: absent.txt"),
        (
            "empty",
            f"{ORIGIN}: data.source: no file of a known type in empty; name another folder; known are .txt .jsonl",
        ),
        ("notes.md", f"{ORIGIN}: data.source: unknown file type: notes.md; known are .txt .jsonl"),
        ("nothing.txt", "nothing.txt: data.source: the file is empty"),
        (["embedded"], f"{ORIGIN}: data.source: no such file or folder: embedded"),
    ],
)
def test_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | list[str], fault: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "nothing.txt").touch()
    with pytest.raises(DataError) as raised:
        list(documents(DataSection(source=source), ORIGIN))
    assert str(raised.value).startswith(fault)
    assert len(raised.value.faults) == 1


def test_all_paths_that_are_wrong_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        source_files(DataSection(source=[str(tmp_path / name) for name in ("a.txt", "b.txt", "")]), ORIGIN)
    assert len(raised.value.faults) == 3


def test_an_empty_file_in_a_folder_is_a_fault(mixed: Path) -> None:
    (mixed / "deeper" / "z.txt").touch()
    with pytest.raises(DataError, match=r"z\.txt: data\.source: the file is empty"):
        list(documents(DataSection(source=str(mixed))))


def test_identity_of_files_changes_with_them(mixed: Path) -> None:
    data = DataSection(source=str(mixed))
    before = identity(data)
    assert identity(data) == before
    os.utime(mixed / "a.txt", ns=(1, 1))
    touched = identity(data)
    assert touched != before
    (mixed / "a.txt").write_text("longer text")
    os.utime(mixed / "a.txt", ns=(1, 1))
    assert identity(data) != touched
    assert identity(DataSection(source=str(mixed), text_column="body")) != identity(data)


def test_identity_is_json_and_names_the_python() -> None:
    facts = identity(DataSection())
    assert json.loads(json.dumps(facts)) == facts
    assert facts["embedded"] == platform.python_version()


def test_identity_of_a_hub_data_set() -> None:
    one = DataSection(source="user/set", subset="a")
    assert identity(one) != identity(DataSection(source="user/set", subset="b"))
    assert identity(one) == identity(DataSection(source="user/set", subset="a", streaming=True))


def test_sample_takes_of_every_file(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name}{number:03d}" for number in range(100)))
    taken = list(sample(DataSection(source=str(tmp_path)), ORIGIN, 80))
    assert [text[0] for text in taken] == ["a"] * 5 + ["b"] * 5 + ["c"] * 5 + ["d"] * 5


def test_sample_is_bounded(mixed: Path) -> None:
    assert len(list(sample(DataSection(source=str(mixed)), ORIGIN, 12))) == 2
    assert len(list(sample(DataSection(source=str(mixed)), ORIGIN, 10**9))) == 7
    assert sum(map(len, sample(DataSection(), ORIGIN, 20_000))) < 20_000 + 5_000


def test_sample_of_the_embedded_text_is_spread() -> None:
    taken = list(sample(DataSection(), ORIGIN, 10**9))
    assert taken == [text for number, text in enumerate(embedded_documents()) if number % sources.SAMPLE_STRIDE == 0]


def test_long_documents_of_a_hub_data_set_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "hub_texts", lambda data, name, origin: iter(["a\n" * 2**20, " ", "b"]))
    found = list(documents(DataSection(source="user/set")))
    assert [len(text) for text in found] == [2**20, 2**20, 1]
