"""What the README shows works as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigtrain
from bigtrain.config.shipped import shipped_recipes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.layers[1](self.layers[0](x).tanh()) - y).square().mean()


def test_the_custom_loop_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    names: dict[str, Any] = {"model": Small(), "batches": [{"x": x, "y": x.sum(1, keepdim=True)}] * 12}
    before = names["model"].layers[0].weight.clone()
    (loop,) = blocks("python")
    exec(loop, names)
    assert torch.isfinite(names["result"].loss)
    assert not names["result"].skipped
    assert not torch.equal(names["model"].layers[0].weight, before)


def test_the_recipe_is_one(tmp_path: Path) -> None:
    (shown,) = blocks("yaml")
    (tmp_path / "shown.yaml").write_text(shown)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text")
    recipe = bigtrain.load_recipe(tmp_path / "shown.yaml", [f"data.source={tmp_path / 'texts'}", "train.device=cpu"])
    assert bigtrain.plan(recipe).parameters == 335174458


def test_every_recipe_that_is_named_is_shipped() -> None:
    named = set(re.findall(r"recipes/(\w+)\.yaml", README))
    assert named
    assert named <= set(shipped_recipes())


def test_every_file_that_is_named_is_there() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).is_file(), link
    for name in re.findall(r"`(\w+\.json)`", README):
        assert (ROOT / "benchmarks" / name).is_file() or (ROOT / "recipes" / name).is_file(), name


def test_make_has_the_targets_that_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)`?", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_its_tables_and_those_of_the_pages_are_what_was_measured() -> None:
    script = [sys.executable, ROOT / "scripts" / "generate_tables.py", "--check"]
    checked = subprocess.run(script, capture_output=True, text=True, check=False, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
