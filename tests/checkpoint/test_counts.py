"""state.json as a stranger may have written it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint.counts import read_counts
from bigtrain.errors import CheckpointError

WHOLE: dict[str, Any] = {
    "step": 3,
    "tokens": 900,
    "notes": {
        "skips": {"total": 3, "in_a_row": 1},
        "spikes": {"losses": [2.5, 2.25], "rollbacks": 0, "beyond": 0, "left_out": [[8, 15]]},
    },
    "loader": {"row": 24, "corpus": "ab12"},
    "loss_scale": {"scale": 1.0, "good_steps": 0},
    "optimizer_class": "AdamW",
    "optimizer_format": "fp32",
    "optimizer": {"a.weight.step": 3},
}


def test_what_a_run_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps(WHOLE))
    assert read_counts(path) == WHOLE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", "3"),
        ("step", True),
        ("tokens", 2**70),
        ("loader", []),
        ("loader", {"row": 1}),
        ("loader", {"row": -8, "corpus": "x"}),
        ("loss_scale", {"scale": "1", "good_steps": 0}),
        ("loss_scale", None),
        ("loss_scale", {"scale": 10**400, "good_steps": 0}),
        ("optimizer", {"a": [1]}),
        ("optimizer_class", 3),
        ("optimizer_format", 3),
        ("notes", []),
        ("notes", {"skips": None}),
        ("notes", {"skips": {"many": 3}}),
        ("notes", {"spikes": {"losses": ["a"]}}),
        ("notes", {"spikes": {"left_out": [[1, -2]]}}),
        ("notes", {"others": {}}),
    ],
)
def test_what_no_run_writes_is_refused(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps({**WHOLE, key: value}))
    with pytest.raises(CheckpointError, match=f"damaged: no {key} can be"):
        read_counts(path)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"step": NaN}', '{"step": 1, "step": 2}'])
def test_what_is_no_state_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="state.json: damaged"):
        read_counts(path)
    with pytest.raises(CheckpointError, match="damaged"):
        read_counts(tmp_path / "absent.json")
