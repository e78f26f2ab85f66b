"""One thing that was looked at, and what to do about it."""

from __future__ import annotations

from typing import Literal, NamedTuple

MARKS = {"ok": "ok", "note": "--", "fault": "!!"}
"""How each state is printed."""


class Finding(NamedTuple):
    """What was looked at, what is there, whether that is `ok`, worth a `note` or a `fault`, and what to do about it."""

    state: Literal["ok", "note", "fault"]
    what: str
    text: str
    do: str = ""

    @property
    def is_fault(self) -> bool:
        return self.state == "fault"

    def line(self, width: int) -> str:
        """Return it for people; `what` takes so many letters."""
        do = f"; {self.do}" if self.do else ""
        return f"{MARKS[self.state]}  {self.what:{width}}  {self.text}{do}"


def ok(what: str, text: str) -> Finding:
    """Return what is as it should be."""
    return Finding("ok", what, text)


def note(what: str, text: str, do: str) -> Finding:
    """Return what works and could be better, and how."""
    return Finding("note", what, text, do)


def fault(what: str, text: str, do: str) -> Finding:
    """Return what stops a run, and the way out."""
    return Finding("fault", what, text, do)
