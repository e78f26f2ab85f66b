"""What torch says in a process of its own: on this machine, and where it does not start."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bigtrain.doctor import probe
from bigtrain.doctor.probe import Probe, ask_torch, lasting_flops, look
from bigtrain.planner.hardware import Hardware
from bigtrain.training import peak

SAID = (
    '{"cuda": null, "nccl": null, "sees_gpu": false, "varlen": false, "best": {"fp32": 2.0}, '
    '"precision": "fp32", "lasting": 1.0}'
)


def answer(monkeypatch: pytest.MonkeyPatch, code: int, out: str, errors: str = "") -> list[list[str]]:
    asked: list[list[str]] = []

    def run(command: list[str], **_options: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=code, stdout=out, stderr=errors)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_the_last_line_is_the_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = answer(monkeypatch, 0, f"a library says hello\n{SAID}\n")
    assert ask_torch(tmp_path) == Probe(None, None, False, False, {"fp32": 2.0}, "fp32", 1.0)
    assert asked[0][-2:] == ["bigtrain.doctor.probe", str(tmp_path)]


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ("Traceback\nImportError: libc10.so: no such file\n", "ImportError: libc10.so: no such file"),
        ("", "ended with exit code -11"),
    ],
)
def test_what_it_died_of_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, errors: str, told: str) -> None:
    answer(monkeypatch, -11, "", errors)
    assert ask_torch(tmp_path) == told


def test_a_gpu_that_torch_does_not_see_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "this_machine", lambda: Hardware("cuda", "a GPU", 1, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = look(tmp_path)
    assert (found.sees_gpu, found.best, found.lasting) == (False, {}, 0.0)


def test_here_it_measures_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "this_machine", lambda: Hardware("cpu", "a processor", 1, 2**30))
    monkeypatch.setattr(peak, "PRODUCT_SIZES", {"cpu": 64})
    monkeypatch.setattr(peak, "TRIALS", 2)
    found = look(tmp_path, seconds=0.05)
    assert found.best.keys() == {"fp32", "bf16"}
    assert found.lasting > 1e6
    assert not found.varlen


def test_the_rate_is_of_all_products_over_the_time_they_took(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(probe.time, "perf_counter", lambda: float(next(ticks)))
    done: list[int] = []
    assert lasting_flops((lambda: done.append(1), 6.0), seconds=3.0) == 2 * 6.0 / 3.0
    assert len(done) == 1 + 2
