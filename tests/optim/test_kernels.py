"""NVIDIA's apex is told from PyPI's package of that name, and neither is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bigtrain.optim.kernels import nvidia_apex_present


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_absent() -> None:
    assert not nvidia_apex_present()


def test_another_package_of_that_name(site: Path) -> None:
    assert not nvidia_apex_present()
    (site / "apex" / "optimizers" / "fused_lamb.py").write_text("")
    assert not nvidia_apex_present()


def test_kernels_without_the_optimizer(site: Path) -> None:
    (site / "amp_C.py").write_text("raise RuntimeError('imported')\n")
    assert not nvidia_apex_present()


def test_the_real_one(site: Path) -> None:
    (site / "amp_C.py").write_text("raise RuntimeError('imported')\n")
    (site / "apex" / "optimizers" / "fused_lamb.py").write_text("")
    assert nvidia_apex_present()
    assert "apex" not in sys.modules
