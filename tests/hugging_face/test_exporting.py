"""From runs to folders that transformers loads: the same logits, without a warning, in no more memory than a tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bigtrain
from bigtrain.errors import CheckpointError, InputError
from bigtrain.hugging_face.exporting import Exported, export_folder
from bigtrain.hugging_face.importing import import_folder
from bigtrain.launcher import launch
from bigtrain.models.hf import to_hugging_face
from bigtrain.training.generate import load_trained

SHARED = Path(__file__).parent.parent / "shared"

LEAN = ("amp.precision=bf16", "amp.master_weights=split24", "optimizer.gradient_release=true", "recompute.policy=full")
LEAN += ("train.max_grad_norm=null", "train.micro_batch_size=8")
LLAMA = ("model.family=llama", "model.num_key_value_heads=1")


def trained(recipe: Path, folder: Path, *overrides: str) -> Path:
    changes = ["train.steps=2", "train.eval_every=null", *overrides]
    bigtrain.train(bigtrain.plan(bigtrain.load_recipe(recipe, changes)), folder)
    return folder


def difference(run: Path, made: Exported) -> float:
    """Return the largest difference of logits, read with the tokens of the folder's own tokenizer."""
    import transformers

    theirs = getattr(transformers, made.loader).from_pretrained(made.folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.folder)
    ours = load_trained(run)
    text = "the river falls slowly again red stone"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == ours.tokenizer.encode(text).ids
    with torch.no_grad():
        right = theirs(ids).logits[0]
        end = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
        found = ours.model.logits(ids[0], torch.arange(ids.shape[1]), end)
    assert right.shape == found.shape
    return float((right - found).abs().max())


@pytest.mark.parametrize(
    ("family", "changes"),
    [("bert", ()), ("gpt", ("model.tie_word_embeddings=false",)), ("gpt", LLAMA), ("bert", LEAN)],
    ids=["bert", "gpt-untied", "llama", "bert-split24"],
)
def test_transformers_computes_what_the_run_does(
    tiny_recipes: dict[str, Path], tmp_path: Path, warned: list[str], family: str, changes: tuple[str, ...]
) -> None:
    run = trained(tiny_recipes[family], tmp_path / "run", *changes)
    made = export_folder(run, tmp_path / "out")
    assert difference(run, made) <= 1e-5
    assert not warned
    config = json.loads((made.folder / "config.json").read_text())
    assert config["dtype"] == ("bfloat16" if changes is LEAN else "float32")
    assert config["vocab_size"] == (120 if family == "bert" else 300)
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    files |= {"generation_config.json"} if family == "gpt" else set()
    assert {path.name for path in made.folder.iterdir()} == files
    assert (made.tokenizer, made.files, made.checkpoint) == (True, 1, run / "step-00000002")
    assert {path.name for path in tmp_path.iterdir()} >= {"run", "out"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_too_large_for_a_file_goes_into_several(
    saved: Callable[..., tuple[Path, Any]], tmp_path: Path, warned: list[str]
) -> None:
    import transformers

    folder, model = saved("gpt")
    import_folder(folder, tmp_path / "in")
    made = export_folder(tmp_path / "in", tmp_path / "out", max_shard_bytes=20_000)
    index = json.loads((made.folder / "model.safetensors.index.json").read_text())
    sizes = {path.name: path.stat().st_size for path in made.folder.glob("*.safetensors")}
    assert len(sizes) == made.files > 3
    assert set(index["weight_map"].values()) == sizes.keys()
    assert index["metadata"]["total_size"] == made.size == sum(p.nbytes for p in model.parameters())
    again = transformers.AutoModelForCausalLM.from_pretrained(made.folder)
    right = model.state_dict()
    assert all(torch.equal(tensor, right[name]) for name, tensor in again.state_dict().items())
    assert not warned
    largest = export_folder(tmp_path / "in", tmp_path / "each", max_shard_bytes=1)
    assert largest.files == len(index["weight_map"])


def test_what_cannot_be_exported_is_refused(saved: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export_folder(tmp_path / "absent", tmp_path / "out")
    folder, _ = saved("bert")
    with pytest.raises(InputError, match=r"^command line: OUT: .* exists and is not empty; name another folder$"):
        export_folder(tmp_path / "absent", folder)
    import_folder(folder, tmp_path / "in")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_ranks_of_a_run_become_one_folder(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    changes = ["train.steps=1", "train.eval_every=null", "cluster.devices_per_node=2", "sharding.tensor_parallel=2"]
    assert launch(bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"], changes)), tmp_path / "run") == 0
    assert len(list((tmp_path / "run" / "step-00000001").glob("weights*.safetensors"))) == 2
    export_folder(tmp_path / "run", tmp_path / "out")
    whole = load_trained(tmp_path / "run")
    _, right = to_hugging_face(whole.plan.model, whole.model.state_dict())
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())


@pytest.mark.slow
def test_neither_way_holds_more_than_a_tenth_above_the_weights(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SHARED / "held_by_folders.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = json.loads(done.stdout.splitlines()[-1])
    assert held["weights"] > 45e6
    for way in ("import", "export"):
        assert held[way] <= 1.1 * held["weights"], held
        assert held[way] <= 2 * held["largest"] + 2**23, held  # what streaming takes: a tensor, or one and its turn


@pytest.mark.slow
def test_an_exported_bert_is_fine_tuned_by_the_trainer_of_transformers(
    tiny_recipes: dict[str, Path], tmp_path: Path
) -> None:
    run = trained(tiny_recipes["bert"], tmp_path / "run", "model.initializer_range=0.2")
    made = export_folder(run, tmp_path / "out")
    script = SHARED / "fine_tuned.py"
    done = subprocess.run([sys.executable, script, made.folder, tmp_path / "tuned"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    assert len(losses) == 20
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
