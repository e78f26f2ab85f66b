"""JSON that may be hostile: what is read, and what is refused with a ValueError and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bigtrain import strict_json

REFUSED = {
    "[" * 100_000: "nested too deeply",
    '{"a": ' * 100_000: "nested too deeply",
    '{"a": 1, "b": 2, "a": 3}': "the key 'a' stands there twice",
    '[{"x": {"k": 1, "k": 1}}]': "the key 'k' stands there twice",
    "1e999": "1e999 is too large",
    "[-1e400]": "-1e400 is too large",
    "NaN": "NaN is not a number",
    "[-Infinity]": "-Infinity is not a number",
    "9" * 5000: "digits",
    "[1,]": "Expecting value",
    "": "Expecting value",
    "[" + "1," * strict_json.MOST_VALUES + "1]": "more than 1,000,000 values",
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.items(), ids=range(len(REFUSED)))
def test_what_is_absurd_is_a_value_error(text: str, reason: str) -> None:
    for content in (text, text.encode()):
        with pytest.raises(ValueError, match=reason):
            strict_json.parse(content)


def test_bytes_that_are_no_text_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        strict_json.parse(b'"\xff"')


def test_ordinary_values_are_read() -> None:
    text = '{"a": [1, -2.5, 1e-3, true, null, "é"], "b": {"a": 12345678901234567890}}'
    assert strict_json.parse(text) == {"a": [1, -2.5, 1e-3, True, None, "é"], "b": {"a": 12345678901234567890}}


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert strict_json.read(path) == {"a": 1}
    with pytest.raises(ValueError, match="larger than 0 MiB"):
        strict_json.read(path, 4)


def test_a_file_that_is_larger_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="larger than 8 MiB"):
        strict_json.read(path)


def test_what_stands_in_strings_are_no_values() -> None:
    text = json.dumps({"text": "a, b: [c], {d}" * 20_000, "quoted": '\\",' * 20_000, "n": [1, 2]})
    assert strict_json.parse(text, most_values=100)["n"] == [1, 2]
    with pytest.raises(ValueError, match="more than 100 values"):
        strict_json.parse(json.dumps([0] * 60_000), most_values=100)


@pytest.mark.parametrize(
    "text", ['"' + '\\"' * 200_000, '"' * 200_001, '["' + "\\" * 199_999, '[,"' + "a,:[{" * 99_999]
)
def test_strings_that_do_not_end_are_looked_at_once(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=r".+"):
        strict_json.parse(text, most_values=10)
    assert time.process_time() - began < 5  # it would take minutes if it went back for each quote


def test_a_key_that_stands_twice_among_many_is_soon_found() -> None:
    text = "{" + ", ".join(f'"k{number}": 0' for number in range(100_000)) + ', "k99999": 1}'
    began = time.process_time()
    with pytest.raises(ValueError, match="'k99999' stands there twice"):
        strict_json.parse(text)
    assert time.process_time() - began < 5
