"""What import and export take of host memory: `held_by_folders.py FOLDER`, a line of JSON, in bytes.

`weights` is what all tensors have, `largest` the largest of them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from save_memory import forget, resident

from bigtrain.config.model import ModelConfig
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


def make(folder: Path) -> dict[str, int]:
    """Write a model as a Hugging Face folder; return the bytes of all its tensors and of the largest."""
    config_json, tensors = to_hugging_face(CONFIG, build_model(CONFIG).state_dict())
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


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    held = make(folder / "theirs")
    make(folder / "warm")  # what is imported and allocated once is not of the weights
    held["import"] = more(lambda: import_folder(folder / "theirs", folder / "in"))
    held["export"] = more(lambda: export_folder(folder / "in", folder / "out"))
    print(json.dumps(held))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
