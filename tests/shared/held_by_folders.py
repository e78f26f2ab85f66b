"""What import and export take of host memory: `held_by_folders.py FOLDER [FORMAT]...`, a line of JSON, in bytes.

`weights` is what all tensors have, `largest` the largest of them. Formats are those of programs, pt2 and onnx, and come
after the folders.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from save_memory import forget, resident

from bigtrain.config.model import ModelConfig
from bigtrain.deployment.export import export_program
from bigtrain.hugging_face.exporting import export_folder
from bigtrain.hugging_face.importing import import_folder
from bigtrain.models import build_model
from bigtrain.models.hf import to_hugging_face

CONFIG = ModelConfig(
    family="gpt",
    vocab_size=8000,
    hidden_size=512,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=8,
    intermediate_size=2048,
    max_position_embeddings=128,
)

TINY = dataclasses.replace(CONFIG, vocab_size=64, hidden_size=16, num_hidden_layers=1, intermediate_size=16)


def make(folder: Path, config: ModelConfig = CONFIG) -> dict[str, int]:
    """Write a model as a Hugging Face folder; return the bytes of all its tensors and of the largest."""
    config_json, tensors = to_hugging_face(config, build_model(config).state_dict())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sizes = [tensor.nbytes for tensor in tensors.values()]
    return {"weights": sum(sizes), "largest": max(sizes)}


def more(work: Callable[[], object]) -> int:
    """Return by how much the resident memory was higher at its peak than before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    forget()
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def main(folder: Path, *formats: Any) -> None:
    torch.set_num_threads(1)
    held = make(folder / "theirs")
    make(folder / "warm")  # what is imported and allocated once is not of the weights
    held["import"] = more(lambda: import_folder(folder / "theirs", folder / "in"))
    held["export"] = more(lambda: export_folder(folder / "in", folder / "out"))
    if formats:
        make(folder / "tiny", TINY)
        import_folder(folder / "tiny", folder / "tiny-in")
    for kind in formats:
        export_program(folder / "tiny-in", folder / f"tiny-{kind}", kind)  # what tracing imports is not of the weights
        held[kind] = more(partial(export_program, folder / "in", folder / kind, kind))
    print(json.dumps(held))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
