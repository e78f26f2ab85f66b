"""JSON that may be hostile: what is read, and what is refused with a ValueError and nothing else."""

from __future__ import annotations

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
