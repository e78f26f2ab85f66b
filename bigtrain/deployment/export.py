"""From a run to a folder with a program of its model, and the tokenizer that it reads with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from bigtrain.checkpoint.state import TOKENIZER
from bigtrain.deployment.onnx import check_libraries, write_onnx
from bigtrain.deployment.program import trace, write_pt2
from bigtrain.hugging_face.target import check_unused, new_folder
from bigtrain.training.generate import load_trained

Format = Literal["pt2", "onnx"]

FILES: dict[Format, str] = {"pt2": "model.pt2", "onnx": "model.onnx"}
BYTES_PER_PARAMETER = 4


class Deployed(NamedTuple):
    """What was written from which checkpoint; `size` in bytes of all files."""

    folder: Path
    checkpoint: Path
    file: Path
    parameters: int
    size: int
    tokenizer: bool


def export_program(run: Path, out: Path, kind: Format) -> Deployed:
    """Write the model of a run, a checkpoint or an imported folder as a program in fp32, with its tokenizer.

    The folder is there whole or not at all. In host memory are the weights, and two copies of their largest tensor.
    Raises InputError where `out` cannot be made or a library is missing, CheckpointError for what is no checkpoint.
    """
    check_unused(out.expanduser())
    if kind == "onnx":
        check_libraries()
    trained = load_trained(run.expanduser())
    count = sum(parameter.numel() for parameter in trained.model.parameters())
    tokenizer = trained.folder / TOKENIZER
    with new_folder(out, BYTES_PER_PARAMETER * count) as aside:
        (write_onnx if kind == "onnx" else write_pt2)(trace(trained.model), aside / FILES[kind])
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, aside / TOKENIZER)
        size = sum(file.stat().st_size for file in aside.iterdir())
    folder = out.expanduser()
    return Deployed(folder, trained.folder, folder / FILES[kind], trained.plan.parameters, size, tokenizer.is_file())
