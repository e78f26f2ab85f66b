from __future__ import annotations

import sys
from pathlib import Path

import pytest

import bigtrain
from bigtrain import surroundings


def test_versions_and_places_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path))
    (line,) = surroundings.surroundings().splitlines()
    assert line.startswith(f"bigtrain {bigtrain.__version__}, Python {sys.version_info.major}.")
    assert "torch 2." in line
    assert line.endswith(f"cache {tmp_path}")


def test_what_is_absent_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "LIBRARIES", ("no_such_library",))
    assert "no_such_library absent" in surroundings.surroundings()
