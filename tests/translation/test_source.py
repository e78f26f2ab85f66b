"""JSON files of other libraries: read with line numbers in errors, and values checked where they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.errors import InputError
from bigtrain.translation.source import Source, read_mapping


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{\n "a": 1,\n "b": \n}', r"ds\.json:4: broken JSON: Expecting value"),
        ('{"a": 1,}', r"ds\.json:1: broken JSON: .*no comma before a bracket"),
        ('{\n// stage 3\n"a": 1}', r"ds\.json:2: broken JSON: .*no comments"),
        ("", r"ds\.json:1: broken JSON"),
        ("[1, 2]", r"ds\.json: holds \[1, 2\]; a configuration is a mapping"),
        ('"text"', r"ds\.json: holds 'text'; a configuration is a mapping"),
        ('{"a": 1, "a": 2}', r"ds\.json: the key 'a' stands there twice"),
        ('{"a": NaN}', r"ds\.json: NaN is not a number of JSON"),
        ("[" * 100_000, r"ds\.json: nested too deeply"),
    ],
)
def test_what_is_no_configuration_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(InputError, match=told) as raised:
        read_mapping(tmp_path / "ds.json")
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.json: cannot be read: No such file or directory; name a JSON file"):
        read_mapping(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_mapping(tmp_path)
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(InputError, match="not UTF-8 at byte 7"):
        read_mapping(tmp_path / "latin")
    (tmp_path / "large").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(InputError, match="larger than 1 MiB"):
        read_mapping(tmp_path / "large")


def test_sections_are_taken_apart_and_those_that_are_off_say_nothing() -> None:
    source = Source.of("f", {"a": {"b": 1, "c": {}}, "off": {"enabled": False, "d": 2}, "e": [1]})
    assert source.values == {"a.b": 1, "a.c": {}, "off.enabled": False, "e": [1]}


def test_values_are_noted_as_read_and_wrong_ones_as_faults() -> None:
    values = {"half": 0.5, "text": "6e-4", "word": "x", "yes": True, "huge": 2.0, "auto": "auto", "null": None}
    source = Source.of("f", values)
    assert source.number("half") == 0.5 and source.number("text") == 6e-4 and source.whole("huge") == 2
    assert source.number("auto") is None and source.number("null") is None and source.number("absent") is None
    assert source.autos == ["auto"] and not source.faults and source.has("auto") and not source.has("null")
    assert source.number("word") is None and source.whole("half") is None and source.number("yes") is None
    assert source.text("half") is None and not source.flag("word") and source.flag("yes")
    assert [fault.key for fault in source.faults] == ["word", "half", "yes", "half", "word"]
    assert str(source.faults[0]) == "f: word: 'x' is not a number; write a number"
    assert source.read == {*values, "absent"}


def test_a_number_too_large_is_a_fault_and_each_fault_is_told_once() -> None:
    source = Source.of("f", {"whole": 10**400, "text": "1e999", "list": ["a", 1], "one": "a", "more": ["a", "b"]})
    assert source.number("whole") is source.whole("whole") is source.number("text") is source.texts("list") is None
    assert [fault.key for fault in source.faults] == ["whole", "text", "list"]
    assert source.faults[0].text.endswith("000 is not a number; write a number") and len(source.faults[0].text) < 100
    assert (source.texts("one"), source.texts("more"), source.texts("absent")) == (["a"], ["a", "b"], None)
