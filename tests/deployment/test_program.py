"""A traced model: any batch and length, and no bigtrain to run it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bigtrain.deployment.program import write_pt2

SHAPES = ((1, 1), (1, 9), (5, 1), (3, 24), (2, 2), (7, 7))

ALONE = """
import sys
sys.modules["bigtrain"] = None
import torch
program = torch.export.load("model.pt2").module()
torch.save({shape: program(*inputs) for shape, inputs in torch.load("inputs.pt").items()}, "outputs.pt")
try:
    import bigtrain
except ImportError:
    print("without bigtrain")
"""


def test_it_holds_the_model_s_weights_and_no_copy(traced):
    model, program = traced
    held = {tensor.untyped_storage().data_ptr() for tensor in program.state_dict.values()}
    assert held == {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def test_other_batches_and_lengths_give_the_model_s_logits(traced, padded, right_logits):
    model, program = traced
    run = program.module()
    for shape in SHAPES:
        ids, mask = padded(*shape)
        found = run(ids, mask)
        assert found.shape == (*shape, 100)
        torch.testing.assert_close(found[mask.bool()], right_logits(model, ids, mask), rtol=1e-5, atol=1e-5)


def test_rows_longer_than_the_learned_positions_are_refused(traced, padded):
    model, program = traced
    if model.config.family == "llama":
        assert program.module()(*padded(2, 40)).shape == (2, 40, 100)
        return
    with pytest.raises((AssertionError, RuntimeError), match="24"):
        program.module()(*padded(2, 25))


def test_a_file_runs_where_there_is_no_bigtrain(traced, padded, right_logits, tmp_path):
    model, program = traced
    write_pt2(program, tmp_path / "model.pt2")
    batches = {shape: padded(*shape) for shape in SHAPES}
    torch.save(batches, tmp_path / "inputs.pt")
    apart = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, env=apart, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "without bigtrain"
    for shape, found in torch.load(tmp_path / "outputs.pt").items():
        ids, mask = batches[shape]
        torch.testing.assert_close(found[mask.bool()], right_logits(model, ids, mask), rtol=1e-5, atol=1e-5)
