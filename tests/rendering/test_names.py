"""Names in Kubernetes: every run that can have one gets one, and the others are told why not."""

from __future__ import annotations

import re

import job_files
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.rendering.names import LONGEST_NAME, name_faults, object_name

RFC_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def told(*overrides: str, suffix: str = "-0") -> list[str]:
    return [str(fault) for fault in name_faults(job_files.recipe(*overrides), suffix)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert_large", "bert-large"),
        ("GPT-7B.v2", "gpt-7b-v2"),
        ("run-", "run"),
        ("a__b", "a--b"),
        ("x", "x"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert object_name(name) == expected
    assert not told(f"name={name}")


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", fullmatch=True), st.sampled_from(["-0", "-node-0-127"]))
def test_a_name_without_a_fault_is_a_label_with_its_suffix(name: str, suffix: str) -> None:
    recipe = job_files.recipe().model_copy(update={"name": name})
    made = object_name(name)
    good = RFC_1035.fullmatch(made) is not None and len(made + suffix) <= LONGEST_NAME
    assert [fault.key for fault in name_faults(recipe, suffix)] == ([] if good else ["name"])


def test_a_digit_in_front_is_told_with_a_name_that_would_do() -> None:
    (line,) = told("name=7b_gpt")
    assert line == (
        "command line: name: '7b_gpt': a name in Kubernetes begins with a letter (RFC 1035); write name=run-7b-gpt"
    )
    assert not told("name=run-7b-gpt")


def test_room_depends_on_the_suffix() -> None:
    assert not told(f"name={'a' * 61}", suffix="-0")
    (line,) = told(f"name={'a' * 61}", suffix="-10")
    assert line.endswith("61 letters, and a pod's host name has room for 60; shorten it")


@pytest.mark.parametrize("claim", ["runs", "team.runs-1", "a" * 253])
def test_claims(claim: str) -> None:
    assert not told(f"cluster.volume={claim}")


@pytest.mark.parametrize("claim", ["Runs", "runs_1", "-runs", "runs.", "a" * 254, "{claimName"])
def test_what_is_no_claim(claim: str) -> None:
    (line,) = told(f"cluster.volume='{claim}'")
    assert line.startswith("command line: cluster.volume: ")
    assert "kubectl get pvc" in line


def test_both_are_told() -> None:
    assert len(told("name=1a", "cluster.volume=A")) == 2
