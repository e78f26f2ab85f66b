"""YAML's traps, closed."""

from __future__ import annotations

import math

import pytest

from bigtrain.config.yaml_reader import DEEPEST, plain_value, read_yaml
from bigtrain.errors import Fault


def read(text, root=""):
    return read_yaml(text, "r.yaml:{}".format, root)


def only_fault(text) -> Fault:
    (fault,) = read(text).faults
    return fault


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-4", 6e-4),
        ("1E5", 1e5),
        ("1e+3", 1e3),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("+7", 7),
        ("0", 0),
        ("010", 10),
        ("0o17", "0o17"),
        ("0x1F", "0x1F"),
        ("0b1", "0b1"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("n", "n"),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("2026-01-31", "2026-01-31"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("16GiB", "16GiB"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("inf", "inf"),
        ("1e999", math.inf),
        ("9" * 41, float("9" * 41)),
        ("²", "²"),
        ("٣", "٣"),
    ],
)
def test_plain_values(text, value):
    got = plain_value(text)
    assert got == value and type(got) is type(value)


def test_not_a_number():
    assert math.isnan(plain_value(".nan"))


def test_values_and_places():
    document = read("name: x\ntrain:\n  steps: 5\n  betas: [0.9, '0.95']\n\namp: {precision: bf16}\n")
    assert document.value == {"name": "x", "train": {"steps": 5, "betas": [0.9, "0.95"]}, "amp": {"precision": "bf16"}}
    assert document.origins == {
        "name": "r.yaml:1",
        "train": "r.yaml:2",
        "train.steps": "r.yaml:3",
        "train.betas": "r.yaml:4",
        "amp": "r.yaml:6",
        "amp.precision": "r.yaml:6",
    }
    assert not document.faults and not document.broken


def test_quoted_scalars_are_text():
    assert read("a: 'true'\nb: \"5\"\nc: 'null'").value == {"a": "true", "b": "5", "c": "null"}


def test_root_prefixes_keys():
    document = read("{a: 1}", root="train")
    assert list(document.origins) == ["train.a"]


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "---\n...\n"])
def test_nothing_is_null(text):
    document = read(text)
    assert document.value is None and not document.faults


def test_carriage_returns():
    assert read("a: 1\r\nb:\r\n  c: 2\r\n").value == {"a": 1, "b": {"c": 2}}


def test_duplicate_key_names_both_lines_and_keeps_the_first():
    document = read("a: 1\nb:\n  c: 2\n  d: 3\n  c: 4\n")
    assert document.faults == [Fault("r.yaml:5", "b.c", "given twice, first in line 3; keep one")]
    assert document.value == {"a": 1, "b": {"c": 2, "d": 3}}
    assert document.origins["b.c"] == "r.yaml:3"


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ("a: &x 1", 1, "a", "anchors (&x)"),
        ("b: 1\na: *x", 2, "a", "aliases (*x)"),
        ("<<: 1", 1, "", "merge keys"),
        ("a: !!int 1", 1, "a", "tags (!!int)"),
        ("a: !x [1]", 1, "a", "tags (!x)"),
        ("a: ! 1", 1, "a", "tags (!)"),
        ("[a]: 1", 1, "", "a key must be a word"),
        ("? {a: 1}\n: 2", 1, "", "a key must be a word"),
        ("a: 1\n---\nb: 2", 2, "", "a second document"),
        ("a:\n\tb: 1", 2, "", "a tab cannot indent"),
        ("a: 1\n b: 2", 2, "", "broken YAML: a ':' too many, or a wrong indent"),
        ("a: [1, 2\nb: 3", 1, "", "broken YAML: a bracket or quote that is not closed; close it"),
        ("a: 'x", 1, "", "broken YAML"),
        ("a: @x", 1, "", "broken YAML"),
        ("a: 1\nb: \x07", 2, "", "the character '\\x07' cannot be used"),
        ('a: "\\0"', 1, "a", "the text holds the character '\\x00'"),
        ('a: "\\ud800"', 1, "a", "the text holds the character '\\ud800'"),
        ("a: |\n  x\n", 1, "a", "the text holds the character '\\n'"),
        ('a: "\\U00110000"', 1, "", "out of range"),
        ("%YAML 9.9\n---\na: 1", 1, "", "broken YAML"),
    ],
)
def test_refused(text, line, key, words):
    fault = only_fault(text)
    assert (fault.where, fault.key) == (f"r.yaml:{line}", key)
    assert words in fault.text


def test_a_merge_key_is_one_fault():
    document = read("a:\n  <<: [*x, *y]\n  b: *z\nc:\n  <<: {d: &w 1}\n  e: 2\n")
    assert [(fault.where[-1], fault.key) for fault in document.faults] == [("2", "a"), ("3", "a.b"), ("5", "c")]
    assert document.value == {"a": {"b": None}, "c": {"e": 2}}  # or `<<` would be an unknown key as well


def test_all_faults_at_once():
    document = read("a: &x 1\nb: *x\nc: !t 2\na: 3\n")
    assert [fault.where[-1] for fault in document.faults] == ["1", "3", "4"]  # the alias goes with its anchor
    assert document.broken


def test_broken_text_says_so():
    assert read("a: [").broken
    assert not read("a: &x 1").broken


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "- " * 5000, "? " * 5000])
def test_deep_nesting_is_a_fault(text):
    document = read(text)
    assert document.broken
    assert f"more than {DEEPEST} levels" in document.faults[-1].text


def test_odd_keys_stay_on_one_line():
    document = read('"a\\nb": 1\n1: 2\nnull: 3\n')
    assert list(document.value) == ["'a\\nb'", "1", "null"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[" + "1," * 20_000 + "1]", "more than 10,000 values and keys"),
        ("".join(f"k{number}: 1\n" for number in range(1000)), "more than 500 keys"),
        ("a: 1\n" * 1000, "more than 100 faults"),
    ],
)
def test_a_text_that_is_no_recipe_is_read_no_further(text: str, what: str) -> None:
    document = read_yaml(text, str)
    assert document.broken
    assert [fault.text for fault in document.faults] == [f"{what}; this is not a recipe"]
