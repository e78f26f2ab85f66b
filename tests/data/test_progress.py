from __future__ import annotations

import sys
from typing import Any

import pytest

from bigtrain.data import progress as module
from bigtrain.data.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tokenizing", 1000, shown=True) as progress:
        for seconds in (1, 5, 11, 12, 25):
            clock[0] = 100.0 + seconds
            progress.update(seconds * 20, seconds * 1000)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "tokenizing: 22%, 39s left, 11K tokens, 1K a second",
        "tokenizing: 50%, 25s left, 25K tokens, 1K a second",
    ]
    assert not captured.err


def test_unknown_total(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tokenizing", None, shown=True) as progress:
        clock[0] += 20
        progress.update(5000, 4000)
    assert capsys.readouterr().out == "tokenizing: 4K tokens, 200 a second\n"


def test_silent_unless_shown(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tokenizing", 10, shown=False) as progress:
        clock[0] += 60
        progress.update(5, 5)
        progress.say("done")
    assert capsys.readouterr() == ("", "")


def test_say(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("tokenizing", 10, shown=True) as progress:
        progress.say("done: 3 files")
    assert capsys.readouterr() == ("done: 3 files\n", "")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    updates: list[dict[str, Any]] = []
    with Progress("tokenizing", 1000, shown=True) as progress:
        assert progress._bar is not None
        monkeypatch.setattr(progress._bar, "update", lambda task, **keys: updates.append(keys))
        progress.update(500, 4000)
        progress.say("a line")
    assert updates[0]["completed"] == 500
    assert updates[0]["tokens"].startswith("4K tokens, ")
    captured = capsys.readouterr()
    assert "a line" in captured.out
    assert not captured.err


def test_an_error_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(KeyError), Progress("tokenizing", None, shown=True) as progress:
        raise KeyError
    assert progress._bar is not None
    assert not progress._bar.live.is_started
