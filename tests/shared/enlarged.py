"""Tokenizers that add to a run's, and what of its checkpoints must be alike."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bigtrain.checkpoint.state import OPTIMIZER, WEIGHTS
from bigtrain.checkpoint.stored import StoredTensors

ADDED = 30
"""More than the padding of the tiny models' vocabularies has room for."""

GROWING = ("tokens.weight", "decoder.weight", "decoder_bias")


def larger(run: Path, place: Path, damage: str = "") -> Path:
    """Write the tokenizer of a run with more tokens, or one that does not add to it."""
    return enlarged(next(run.glob("step-*")) / "tokenizer.json", place, damage)


def enlarged(own: Path, place: Path, damage: str = "") -> Path:
    """Write a tokenizer with more tokens than another of 300, or one that does not add to it."""
    if damage == "absent":
        return place
    tokenizer = Tokenizer.from_file(str(own))
    if damage != "nothing":
        tokenizer.add_tokens([f"new{number}" for number in range(ADDED)])
    contents = json.loads(tokenizer.to_str())
    vocabulary = contents["model"]["vocab"]
    names = {number: token for token, number in vocabulary.items()}
    if damage == "shrinks":
        contents["added_tokens"] = []
        contents["model"]["vocab"] = {token: number for token, number in vocabulary.items() if number < 298}
        contents["model"]["merges"] = []
    if damage == "swaps":
        contents["model"]["vocab"] |= {names[270]: 271, names[271]: 270}
    if damage == "end":
        contents["added_tokens"][-1]["content"] = "</s>"
    place.write_text("no JSON" if damage == "no tokenizer" else json.dumps(contents))
    return place


def reading(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a model reads: two documents of old tokens."""
    ids = torch.arange(48) * 7 % tokens
    positions = torch.cat([torch.arange(20), torch.arange(28)])
    return ids, positions, torch.tensor([0, 20, 48], dtype=torch.int32)


def whole_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Return weights and states by name; moments of 4 bits of one file only, as they are packed."""
    found: dict[str, Tensor] = {}
    for kind in (WEIGHTS, OPTIMIZER):
        found |= {f"{kind}: {name}": tensor for name, tensor in StoredTensors(checkpoint, kind).whole()}
    return found


def rows_differ(before: Path, after: Path, tokens: int) -> list[str]:
    """Return the tensors of a checkpoint that are not kept in the extended one, or whose new rows are not as said."""
    had, has = whole_tensors(before), whole_tensors(after)
    assert had.keys() == has.keys()
    wrong = []
    for name, old in had.items():
        new, grows = has[name], any(f": {growing}" in name for growing in GROWING)
        same = torch.equal(new.view(-1)[: old.numel()], old.view(-1)) if grows else torch.equal(new, old)
        if grows and old.dim() and len(old) != len(new):
            same = _kept(name, old, new, tokens)
        wrong += [] if same else [name]
    return wrong


def _kept(name: str, old: Tensor, new: Tensor, tokens: int) -> bool:
    """Tell whether old rows are as they were; new ones are the mean for weights and Adafactor's rows, else zero."""
    if name.endswith("_scale") or old.dtype in (torch.uint8, torch.int8):  # whose blocks may begin with old rows
        return torch.equal(new[: len(old)], old) and not new[len(old) :].any()
    mean = old[:tokens].mean(0, dtype=torch.float64).to(old.dtype)
    added = new[tokens : tokens + ADDED]
    averaged = name.startswith(WEIGHTS) or name.endswith((".row", ".variance"))
    filled = torch.equal(added, mean.expand_as(added)) if averaged else not added.any()
    return torch.equal(new[:tokens], old[:tokens]) and filled and not new[tokens + ADDED :].any()
