"""A traced model as ONNX, as ONNX Runtime runs it."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

from bigtrain.deployment import onnx
from bigtrain.deployment.onnx import check_libraries, write_onnx
from bigtrain.errors import InputError


def test_onnx_runtime_gives_the_model_s_logits(traced, padded, right_logits, tmp_path, caplog):
    import onnxruntime

    model, program = traced
    write_onnx(program, tmp_path / "model.onnx")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    axes = {one.name: one.shape for one in session.get_inputs()}
    assert axes == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    assert [one.shape for one in session.get_outputs()] == [["batch", "length", 100]]
    for shape in ((1, 1), (1, 9), (5, 1), (3, 24), (7, 7)):
        ids, mask = padded(*shape)
        (logits,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        found = torch.from_numpy(logits)[mask.bool()]
        torch.testing.assert_close(found, right_logits(model, ids, mask), rtol=1e-4, atol=1e-4)


def test_a_library_that_is_missing_is_named_with_its_command(monkeypatch):
    check_libraries()
    known = importlib.util.find_spec
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else known(name))
    with pytest.raises(InputError, match="onnx needs onnxscript, not installed; pip install onnxscript"):
        check_libraries()
