"""A save and a load fit in the memory that training fits in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from group import SHARED
from matrix import counted

import bigtrain
from bigtrain.data.ensure import ensure_prepared
from bigtrain.launcher import worker_environment

MARGIN = 8 * 2**20
"""Bytes: what is read and hashed at a time, and what the interpreter allocates meanwhile."""

LARGE = ("model.vocab_size=20000", "model.hidden_size=384", "model.num_hidden_layers=2", "model.num_attention_heads=4")


@pytest.mark.slow
@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_a_save_and_a_load_add_no_copy_of_the_state(tiny_recipes: dict[str, Path], tmp_path: Path, state: str) -> None:
    overrides = [*LARGE, f"optimizer.state={state}"]
    ensure_prepared(bigtrain.load_recipe(tiny_recipes["bert"], overrides))
    script = [sys.executable, SHARED / "held_in_memory.py", tiny_recipes["bert"], tmp_path / "run", *overrides]
    environment = os.environ | worker_environment("cpu") | {"OMP_NUM_THREADS": "1"}
    with counted("memory", "ci", state) as counts:
        ended = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]
        found = json.loads(ended.stdout)
        counts.add(found["save"] <= MARGIN, f"a save adds {found['save']} bytes")
        counts.add(found["load"] <= found["largest"] + MARGIN, f"a load adds {found['load']} bytes")
        for name, number in found.items():
            counts.longest(f"{name} bytes", number)
    assert found["state"] > 50 * 2**20
