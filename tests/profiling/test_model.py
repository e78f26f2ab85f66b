"""A profile of any model, and models by name."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bigtrain.errors import InputError
from bigtrain.profiling.model import load_model, profile_model

TOLERANCE = 5e-3


class Mixer(nn.Module):
    """Mixes positions, then channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.positions = nn.LayerNorm(32), nn.Linear(12, 12)
        self.channels = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mixer() for _ in range(3))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x.mean(1)), labels)


def sample(rows: int = 8) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 12, 32), "labels": torch.zeros(rows, dtype=torch.long)}


@pytest.mark.parametrize(("policy", "micro_batch_size", "foreach"), [("none", 8, False), ("full", 4, True)])
def test_predicted_is_measured(policy: str, micro_batch_size: int, foreach: bool) -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = partial(torch.optim.AdamW, foreach=foreach)
    found = profile_model(
        model, sample(), recompute=policy, micro_batch_size=micro_batch_size, optimizer=optimizer, device="cpu"
    )
    assert abs(found.relative_error) < TOLERANCE
    predicted, measured = found.predicted.memory.by_cause, found.measured.memory.by_cause
    for cause in ("weights", "optimizer_state"):
        assert predicted[cause] == pytest.approx(measured[cause], rel=TOLERANCE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shown = found.as_object()
    assert {block["name"] for block in shown["blocks"]} >= {f"blocks.{place}" for place in range(3)}
    assert shown["name"] == "Net" and shown["recipe"] is None
    assert all(shown["timeline"][side]["time"] for side in ("predicted", "measured"))


def test_blocks_hold_what_is_predicted() -> None:
    found = profile_model(Net(), sample(), optimizer=partial(torch.optim.AdamW, fused=True), device="cpu")
    for block in found.blocks():
        assert block["measured_bytes"] == pytest.approx(block["predicted_bytes"], rel=TOLERANCE, abs=512) != 0
    changes = {change["change"]: change["bytes"] for change in found.changes}
    assert changes and all(size < 0 for size in changes.values())


GRID: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "bench_plan_model.py"))
QUICK = {
    ("nn.TransformerEncoder", "selective", 2, "fused"),
    ("transformers Llama", "none", 1, "fused"),
    ("transformers BERT", "full", 2, "foreach"),
}


EACH_TIME = (2, "fused")
"""Micro-batches and optimizer of the cases that are always run; the others are nightly, and in plan_model.json."""


def marked(case: Any) -> Any:
    mark = pytest.mark.slow if case[2:] == EACH_TIME else pytest.mark.nightly
    return pytest.param(case, marks=() if case in QUICK else mark)


@pytest.mark.parametrize("case", [marked(case) for case in GRID["cases"]()], ids=str)
def test_models_of_all_kinds_hold_what_is_predicted(case: Any) -> None:
    assert abs(GRID["run"](case)["relative_error"]) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "text"), [({"steps": 2}, "2 steps do not show"), ({"device": "h100"}, "'h100' is not of")]
)
def test_what_cannot_be_measured_is_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        profile_model(Net(), sample(), **options)  # type: ignore[arg-type]


WRITTEN = """
import torch
from torch import nn

def make():
    return nn.Linear(2, 2), {"x": torch.zeros(1, 2)}

class Own(nn.Module):
    sample = {"x": torch.zeros(1, 2)}

def wrong():
    return 3

number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bigtrain_made_model.py").write_text(WRITTEN)
    (tmp_path / "bigtrain_lacking_model.py").write_text("import bigtrain_not_there")
    return tmp_path


@pytest.mark.parametrize("name", ["make", "Own"])
def test_models_by_name(here: Path, name: str) -> None:
    model, found = load_model(f"bigtrain_made_model:{name}")
    assert isinstance(model, nn.Module) and found["x"].shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bigtrain_made_model", "'bigtrain_made_model' does not name a callable; write module:callable"),
        ("bigtrain_absent:make", "there is no module 'bigtrain_absent'"),
        ("bigtrain_made_model:other", "bigtrain_made_model has no 'other'; it has .*make"),
        ("bigtrain_made_model:number", "is a int; name a function"),
        ("bigtrain_made_model:wrong", "returns a int; let it return a model and a sample"),
    ],
)
def test_names_that_lead_nowhere(here: Path, name: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        load_model(name)


def test_what_a_module_itself_lacks_is_its_own_fault(here: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="bigtrain_not_there"):
        load_model("bigtrain_lacking_model:make")
