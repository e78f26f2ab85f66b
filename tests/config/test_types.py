"""Values of every type, right and wrong."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from bigtrain.config import types
from bigtrain.config.types import Auto

STRICT = {"strict": True}


def read(kind: Any, value: object) -> object:
    return TypeAdapter(kind).validate_python(value, strict=True)


@pytest.mark.parametrize(
    ("kind", "value", "result"),
    [
        ("Count", 5, 5),
        ("Count", "32B", 32 * 10**9),
        ("Count", "1_000", 1000),
        ("CountOrZero", 0, 0),
        ("Kept", 2, 2),
        ("Bytes", "16GiB", 2**34),
        ("Seconds", "5min", 300.0),
        ("WarmUp", 7, 7),
        ("WarmUp", 0, 0),
        ("WarmUp", "6%", "6%"),
        ("WarmUp", "6 %", "6%"),
        ("WarmUp", "2K", 2000),
        ("Stage", 3, 3),
        ("Stage", "auto", "auto"),
        ("NodeRange", "2:4", "2:4"),
        ("Positive", 1, 1.0),
        ("NonNegative", 0, 0.0),
        ("Fraction", 0.0, 0.0),
        ("Word", "registry.example/a:1", "registry.example/a:1"),
        ("Betas", [0.9, 0.95], [0.9, 0.95]),
        ("RunName", "bert_large.2-a", "bert_large.2-a"),
        ("OpenFraction", 0.5, 0.5),
        ("Text", "a", "a"),
    ],
)
def test_accepted(kind, value, result):
    got = read(getattr(types, kind), value)
    assert got == result and type(got) is type(result)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (
            "Count",
            [0, -1, 1.5, 4.0, True, None, "eight", "1.5", "-3", "5GiB", [], {}, 2**63, float("inf"), float("nan")],
        ),
        ("CountOrZero", [-1, True, 0.0, 2**63]),
        ("Kept", [0, 1, True, "1"]),
        ("Bytes", [24, 24.0, True, "24", "24 apples", "0B", None, "9999999999TiB"]),
        ("Seconds", [60, 60.0, "60", "0s", True, None, "99999999999d"]),
        ("WarmUp", [-1, -0.1, 0.06, True, "101%", "six", "%", None, "-5%", 2**63]),
        ("Stage", [True, False, 1.0, 4, -1, "3", None]),
        ("NodeRange", ["2", "2:", ":4", "0:4", "a:b", "2:4\n", "٢:4", 2]),
        ("Positive", [0, -1.0, True, "1", float("inf"), float("nan"), None]),
        ("NonNegative", [-1e-9, True, "0", float("inf"), float("nan")]),
        ("Fraction", [-0.1, 1, 1.0, True, "0.5", float("nan")]),
        ("OpenFraction", [0, 1, 0.0, -0.1, 1.1, True, float("nan")]),
        ("Text", ["", 5, None, True]),
        ("Word", ["", "a b", "a\n", "a\u00a0b", "#a", 5, None]),
        ("Betas", [[0.9], [0.9, 1.0], [0.9, 0.9, 0.9], 0.9, None]),
        ("RunName", ["", "-a", ".a", "a b", "a/b", "a\n", 5, None]),
    ],
)
def test_refused(kind, values):
    for value in values:
        with pytest.raises(ValidationError):
            read(getattr(types, kind), value)


def test_messages_show_what_to_write():
    with pytest.raises(ValidationError, match="24 has no unit; write for example '24GiB'"):
        read(types.Bytes, 24)
    with pytest.raises(ValidationError, match=r"100000\.0 is not a whole number; write 100000"):
        read(types.Count, 1e5)


def test_units_come_back_when_written():
    assert TypeAdapter(types.Bytes | Auto).dump_python(2**34) == "16GiB"
    assert TypeAdapter(types.Bytes | Auto).dump_python("auto") == "auto"
    assert TypeAdapter(types.Seconds).dump_json(60.0) == b'"60s"'
