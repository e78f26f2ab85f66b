"""scripts/profile_memory.py from one end to the other: a model of the user's own, by the name of what makes it."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.memory.report import CAUSES

SCRIPT = Path(__file__).parents[2] / "scripts" / "profile_memory.py"

WRITTEN = """
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(functional.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x, labels):
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x.mean(1)), labels)


class Reads(Net):
    def forward(self, x, labels):
        return super().forward(x * x.sum().item(), labels)


def sample():
    return {"x": torch.randn(8, 32, 16), "labels": torch.zeros(8, dtype=torch.long)}


def make():
    return Net(), sample()


def reads():
    return Reads(), sample()


number = 3
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return what runs the script in a folder with a module, and gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    (tmp_path / "bigtrain_net_of_a_user.py").write_text(WRITTEN)
    script: dict[str, Any] = runpy.run_path(str(SCRIPT))

    def main(*arguments: str) -> tuple[int, str, str]:
        code: int = script["main"](arguments)
        return code, *capsys.readouterr()

    return main


def test_a_model_is_profiled_within_half_a_percent(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "found.html"
    code, out, _ = run("--model", "bigtrain_net_of_a_user:make", "--json", "--html", str(page))
    found = json.loads(out)
    predicted, measured = found["predicted"], found["measured"]
    assert code == 0 and found["name"] == "Net"
    assert measured["allocated_bytes_peak"] == pytest.approx(predicted["allocated_bytes_peak"], rel=5e-3)
    assert set(predicted["by_cause"]) == set(measured["by_cause"]) == set(CAUSES)
    assert [block["name"] for block in found["blocks"]] == ["blocks.0", "blocks.1", "blocks.2", "outside of the blocks"]
    assert sum(block["measured_bytes"] for block in found["blocks"]) == measured["allocated_bytes_peak"]
    assert "Net" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "bigtrain_net_of_a_user"], "does not name a callable; write module:callable"),
        (["--model", "bigtrain_net_of_no_one:make"], "there is no module 'bigtrain_net_of_no_one'"),
        (["--model", "bigtrain_net_of_a_user:mak"], "bigtrain_net_of_a_user has no 'mak'; it has"),
        (["--model", "bigtrain_net_of_a_user:number"], "is a int; name a function"),
        (["--model", "bigtrain_net_of_a_user:sample"], "returns a dict; let it return a model and a sample"),
        (["--model", "bigtrain_net_of_a_user:reads"], "aten._local_scalar_dense.default needs numbers"),
        (["no_such_recipe.yaml", "--model", "bigtrain_net_of_a_user:make"], "give either a recipe or --model"),
        ([], "give either a recipe or --model"),
    ],
)
def test_what_cannot_be_profiled_is_one_line_and_exit_2(run: Run, arguments: list[str], text: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and not out
    assert text in err and err.count("\n") == 1
