"""A traced model as ONNX: a .onnx file of the graph, and its weights in a file beside it."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.export import ExportedProgram

from bigtrain.deployment.program import INPUTS
from bigtrain.errors import InputError

LIBRARIES = ("onnx", "onnxscript")
"""What torch translates with."""

AXES = {INPUTS[0]: {0: "batch", 1: "length"}, INPUTS[1]: {0: None, 1: None}}
"""Names of the open axes; the second input's are those of the first, and torch warns of names that are given twice."""

REGISTRY = "torch.onnx._internal.exporter._registration"
"""It logs that torchvision is not there, of which no model here uses anything."""


def check_libraries() -> None:
    """Raise InputError if what torch needs to write ONNX is not installed."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise InputError(f"command line: --format: onnx needs {names}, not installed; pip install {' '.join(missing)}")


def write_onnx(program: ExportedProgram, file: Path) -> None:
    """Translate a traced model and write it, weights to `FILE.data`; its axes are `batch` and `length`."""
    with _translator_unsaid():
        translated = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            input_names=INPUTS,
            output_names=["logits"],
            dynamic_shapes=AXES,
        )
    assert translated is not None
    translated.save(file, external_data=True)


@contextmanager
def _translator_unsaid() -> Iterator[None]:
    """Keep torch's translator from telling users what concerns its own authors alone."""
    log = logging.getLogger(REGISTRY)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # It copies a structure of torch's own by a class that torch has deprecated (2.13).
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        log.setLevel(level)
