"""From a run to a folder that serves."""

from __future__ import annotations

import pytest
import torch
from trained import train

from bigtrain.deployment import export
from bigtrain.deployment.export import export_program
from bigtrain.errors import InputError
from bigtrain.training.generate import load_trained


def test_a_run_becomes_a_program_with_its_tokenizer(tiny_recipes, tmp_path, padded, right_logits, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "served"
    train(tiny_recipes["gpt"], run, "train.steps=1", "train.eval_every=null")
    made = export_program(run, out, "pt2")
    assert sorted(file.name for file in out.iterdir()) == ["model.pt2", "tokenizer.json"]
    assert made.file == out / "model.pt2"
    assert made.size == sum(file.stat().st_size for file in out.iterdir())
    model = load_trained(run).model
    ids, mask = padded(3, 11)
    with torch.no_grad():
        found = torch.export.load(made.file).module()(ids, mask)
    torch.testing.assert_close(found[mask.bool()], right_logits(model, ids, mask), rtol=1e-5, atol=1e-5)

    with pytest.raises(InputError, match=r"OUT: .*served: exists and is not empty"):
        export_program(run, out, "pt2")

    def broken(*_: object) -> None:
        raise RuntimeError("killed half-way")

    monkeypatch.setattr(export, "write_pt2", broken)
    with pytest.raises(RuntimeError, match="half-way"):
        export_program(run, tmp_path / "other", "pt2")
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == ["run", "served"]
