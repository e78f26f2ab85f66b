from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data import json_stream
from bigtrain.data.json_stream import json_values
from bigtrain.errors import DataError

HERE = Path("some.json")
VALUES = st.none() | st.integers() | st.text(max_size=6) | st.lists(st.booleans(), max_size=3)
OBJECTS = st.lists(st.dictionaries(st.sampled_from(["a", "text", '"]', "{\n"]), VALUES, max_size=2), max_size=4)


def parse(text: str, size: int = 1000) -> list[tuple[int, object]]:
    return list(json_values(HERE, (text[start : start + size] for start in range(0, len(text), size))))


@settings(max_examples=50, deadline=None)
@given(OBJECTS, st.integers(1, 9), st.sampled_from([None, 1]))
def test_array(objects: list[object], size: int, indent: int | None) -> None:
    assert [value for _, value in parse(json.dumps(objects, indent=indent), size)] == objects


@settings(max_examples=50, deadline=None)
@given(OBJECTS, st.integers(1, 9), st.sampled_from([None, 1]))
def test_one_after_another(objects: list[object], size: int, indent: int | None) -> None:
    text = "\n".join(json.dumps(value, indent=indent) for value in objects)
    assert [value for _, value in parse(text, size)] == objects


def test_lines_are_counted_from_one() -> None:
    assert parse('[\n {"a":\n 1},\n\n {"b": 2}]') == [(2, {"a": 1}), (5, {"b": 2})]
    assert parse('\n{"a": 1}\n{"b": 2}\n', size=3) == [(2, {"a": 1}), (3, {"b": 2})]


def test_nothing() -> None:
    assert parse("") == []
    assert parse(" \n") == []
    assert parse("[]") == []


def test_only_the_present_value_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 64)
    held = 0
    stream = json_stream._Stream(HERE, (f'{{"number": {number}}}\n' for number in range(5000)))
    while stream.next_mark():
        stream.value()
        held = max(held, len(stream.buffer))
    assert held < 300


def test_a_broken_value_does_not_read_the_whole_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 64)
    monkeypatch.setattr(json_stream, "LARGEST_LINE", 1000)
    taken = 0

    def texts():  # type: ignore[no-untyped-def]
        nonlocal taken
        yield '{"a": "'
        for _ in range(100_000):
            taken += 10
            yield "x" * 10

    with pytest.raises(DataError, match=r"some\.json:1: data\.source: broken JSON"):
        list(json_values(HERE, texts()))
    assert taken < 5000


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[{"a": 1}\n {"b": 2}]', "some.json:2: data.source: broken JSON: ',' or ']' is missing"),
        ('[{"a": 1}', "some.json:1: data.source: broken JSON: ',' or ']' is missing"),
        ('[{"a": 1}, ', "some.json:1: data.source: broken JSON: Expecting value"),
        ('[{"a": 1}]\n{"b": 2}', "some.json:2: data.source: broken JSON: more text after the array"),
        ('[\n{"a": 1},\n{"b": nope}]', "some.json:3: data.source: broken JSON: Expecting value"),
        ('{"a": 1,\n\n 2}', "some.json:3: data.source: broken JSON: Expecting property name"),
        (
            '[{"a": 1},\n{"b": ' + "1" * 5000 + "}]",
            "some.json:2: data.source: broken JSON: a number of too many digits",
        ),
        ("[" * 200_000, "some.json:1: data.source: broken JSON: nested too deeply"),
    ],
)
def test_faults_name_the_line(text: str, fault: str) -> None:
    with pytest.raises(DataError) as raised:
        parse(text)
    assert str(raised.value).startswith(fault)


def test_a_large_value_does_not_make_the_small_ones_after_it_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(json_stream.strict_json, "check_values", lambda text: counted.append(len(text)))
    text = json.dumps([{"text": "x" * 500_000}, *({"text": "y" * 60} for _ in range(2000))])
    assert len(parse(text, size=1000)) == 2001
    assert sum(counted) < 4 * len(text)


def test_values_behind_a_value_are_not_counted_as_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream.strict_json, "MOST_VALUES", 1000)
    text = json.dumps([{"text": "x" * 200_000}, *([number] for number in range(9000))])
    assert len(parse(text, size=100_000)) == 9001
