"""How a command speaks: quiet, verbose, with colours or without."""

from __future__ import annotations

import io
import sys
import time

import pytest

from bigtrain import terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", terminal.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def a_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Have standard output be a terminal: from inside a test, since pytest puts its own there before each."""
    shown = Screen()
    monkeypatch.setattr(sys, "stdout", shown)
    return shown


def test_what_is_told_and_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.tell("made it")
    terminal.tell_next("bigtrain one", "bigtrain two")
    terminal.tell_next("bigtrain three", aside=True)
    assert capsys.readouterr() == ("made it\nnext: bigtrain one, or: bigtrain two\n", "next: bigtrain three\n")


def test_quiet_says_nothing_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(terminal.VARIABLE, "quiet")
    terminal.tell("made it")
    terminal.tell_next("bigtrain one", aside=True)
    assert terminal.is_quiet() and not terminal.is_verbose()
    assert capsys.readouterr() == ("", "")


def test_processes_that_are_started_inherit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(terminal.VARIABLE, "normal")
    terminal.set_verbosity("verbose")
    assert terminal.is_verbose()
    assert terminal.os.environ[terminal.VARIABLE] == "verbose"


@pytest.mark.parametrize("name", ["FORCE_COLOR", "NO_COLOR"])
def test_no_colours_without_a_terminal(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    terminal.console().print("[red]a word[/red]")
    assert shown.getvalue() == "a word\n"


def test_colours_on_a_terminal_unless_unwanted(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = a_screen(monkeypatch)
    terminal.console().print("[red]one[/red]")
    assert "\x1b[31m" in screen.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    before = len(screen.getvalue())
    terminal.console().print("[red]two[/red]")
    assert "\x1b[31m" not in screen.getvalue()[before:]


def test_a_dumb_terminal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    a_screen(monkeypatch)
    assert terminal.is_terminal()
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.is_terminal()


def test_what_is_short_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = a_screen(monkeypatch)
    with terminal.working("thinking"):
        pass
    assert screen.getvalue() == ""


def test_what_is_long_moves_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = a_screen(monkeypatch)
    monkeypatch.setattr(terminal, "PATIENCE_SECONDS", 0.0)
    with terminal.working("thinking"):
        until = time.monotonic() + 60
        while "thinking" not in screen.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    assert "thinking" in screen.getvalue()


def test_what_is_long_is_a_line_now_and_then_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.01)
    said = ""
    with terminal.working("thinking"):
        until = time.monotonic() + 60
        while not said and time.monotonic() < until:
            time.sleep(0.02)
            said += capsys.readouterr().out
    assert said.startswith("thinking ... 0 s\n")


@pytest.mark.parametrize(("level", "aside"), [("quiet", False), ("normal", True)])
def test_nobody_is_told_who_did_not_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str, aside: bool
) -> None:
    monkeypatch.setenv(terminal.VARIABLE, level)
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.005)
    with terminal.working("thinking", aside=aside):
        time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_it() -> None:
    with pytest.raises(KeyError), terminal.working("thinking"):
        raise KeyError
