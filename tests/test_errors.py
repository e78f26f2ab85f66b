"""What users read when something is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain import errors
from bigtrain.errors import (
    CheckpointError,
    DataError,
    DoesNotFit,
    Fault,
    InputError,
    Interrupted,
    RecipeError,
    ResumeError,
    did_you_mean,
    edit_distance,
    nearest_word,
)


def test_fault_joins_what_it_has():
    assert str(Fault("bert.yaml:17", "amp.precison", "unknown key")) == "bert.yaml:17: amp.precison: unknown key"
    assert str(Fault("", "", "no such recipe")) == "no such recipe"


def test_error_is_one_line_a_fault():
    error = RecipeError(Fault("a.yaml:1", "seed", "wrong"), "and this")
    assert str(error) == "a.yaml:1: seed: wrong\nand this"
    assert [fault.text for fault in error.faults] == ["wrong", "and this"]


@pytest.mark.parametrize("kind", [RecipeError, DataError, CheckpointError, ResumeError])
def test_wrong_input_is_a_value_error_with_exit_code_2(kind):
    assert issubclass(kind, InputError) and issubclass(kind, ValueError)
    assert kind("text").exit_code == 2


def test_report_prints_a_line_a_fault(capsys):
    assert RecipeError(Fault("a.yaml:1", "seed", "wrong"), "and this").report() == 2
    assert capsys.readouterr() == ("", "error: a.yaml:1: seed: wrong\nerror: and this\n")


def test_other_exit_codes():
    assert (errors.BigtrainError.exit_code, DoesNotFit.exit_code, Interrupted.exit_code) == (1, 3, 75)


@pytest.mark.parametrize(
    ("left", "right", "edits"),
    [("", "", 0), ("", "abc", 3), ("eps", "pes", 1), ("lam", "lamb", 1), ("steps", "tsepss", 2), ("ca", "abc", 3)],
)
def test_edit_distance(left, right, edits):
    assert edit_distance(left, right) == edit_distance(right, left) == edits


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edit_distance_is_a_distance(left, right):
    edits = edit_distance(left, right)
    assert (edits == 0) == (left == right)
    assert abs(len(left) - len(right)) <= edits <= max(len(left), len(right))


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("lam", ["adamw", "lamb"], "lamb"),
        ("micro_batchsize", ["micro_batch_size", "global_batch_size"], "micro_batch_size"),
        ("Micro-Batch-Size", ["micro_batch_size"], "micro_batch_size"),
        ("pes", ["eps", "steps"], "eps"),
        ("warmup", ["warmup_steps", "every_steps"], "warmup_steps"),
        ("zzz", ["eps", "steps"], None),
        ("x", ["y"], None),
        ("word", [], None),
        ("a" * 65, ["a" * 64], None),
    ],
)
def test_nearest_word(word, known, expected):
    assert nearest_word(word, known) == expected


def test_nearest_word_takes_a_likeness():
    assert nearest_word("warmup", ["warmup_steps"], likeness=0.9) is None


def test_did_you_mean():
    assert did_you_mean("precison", ["precision"]) == "; did you mean 'precision'?"
    assert did_you_mean("zzz", ["precision"]) == ""
