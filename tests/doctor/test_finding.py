"""A finding as a line, and that whatever is not in order says what to do."""

from __future__ import annotations

from bigtrain.doctor import lines
from bigtrain.doctor.finding import fault, note, ok


def test_a_line_says_the_state_what_it_is_of_and_what_to_do() -> None:
    found = [ok("torch", "2.13"), note("cache", "full", "make room"), fault("Python", "3.10", "use 3.11")]
    assert lines(found) == [
        "ok  torch   2.13",
        "--  cache   full; make room",
        "!!  Python  3.10; use 3.11",
    ]
    assert [finding.is_fault for finding in found] == [False, False, True]
