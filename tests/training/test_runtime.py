"""What surrounds the loop: signals, seeds, memory, the device."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bigtrain
from bigtrain.errors import RecipeError
from bigtrain.planner.hardware import Hardware
from bigtrain.planner.plan import Plan
from bigtrain.training.runtime import STOP_SIGNALS, host_bytes_peak, runtime, seed_step


@pytest.fixture
def plan(tiny_recipes: dict[str, Path]) -> Plan:
    return bigtrain.plan(bigtrain.load_recipe(tiny_recipes["bert"]))


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_handlers_are_put_back(plan: Plan, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with runtime(plan) as here:
        assert here.stop_signal is None
        signal.raise_signal(number)
        assert here.stop_signal == number
        assert here.device == torch.device("cpu")
    assert signal.getsignal(number) == before


def test_a_second_signal_ends_the_process() -> None:
    script = (
        "import os, signal, torch; from bigtrain.training.runtime import Runtime\n"
        "from bigtrain.training import runtime; runtime.ECHO_SECONDS = -1.0\n"
        "here = Runtime(torch.device('cpu')); signal.signal(signal.SIGTERM, here.request_stop)\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('first', flush=True); os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('second', flush=True)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == -signal.SIGTERM
    assert ran.stdout == "first\n"


def test_an_echo_of_a_signal_is_no_second_one(plan: Plan) -> None:
    with runtime(plan) as here:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert here.stop_signal == signal.SIGTERM


def test_the_garbage_collector_is_put_back(plan: Plan) -> None:
    with runtime(plan):
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_cuda_without_a_cuda_torch_is_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_gpu = dataclasses.replace(plan, hardware=Hardware("cuda", "x", 1, 1))
    with pytest.raises(RecipeError, match="sees no CUDA device; install a CUDA build"), runtime(on_gpu):
        pass


def draws(seed: int, step: int, rank: int = 0) -> list[float]:
    seed_step(seed, step, rank)
    return torch.rand(4).tolist()


def test_dropout_is_a_pure_function_of_seed_step_and_rank() -> None:
    assert draws(1, 2) == draws(1, 2)
    assert len({tuple(draws(*where)) for where in ((1, 2), (2, 1), (1, 3), (1, 2, 1), (12, 0), (1, 20))}) == 6


def test_host_bytes_peak_sees_what_was_touched() -> None:
    before = host_bytes_peak()
    held = torch.ones(64 * 2**20)
    assert host_bytes_peak() >= before
    assert host_bytes_peak() > held.numel() * 4
    assert host_bytes_peak() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
