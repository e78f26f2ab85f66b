"""What a trained model says: a GPT continues a text, a BERT fills its masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bigtrain.checkpoint.resume import stored_recipe
from bigtrain.checkpoint.state import TOKENIZER, load_weights
from bigtrain.checkpoint.store import find_checkpoint
from bigtrain.data.tokenizer import open_tokenizer, special_tokens
from bigtrain.errors import DataError
from bigtrain.planner.hardware import cpu
from bigtrain.planner.mechanisms import without_mechanisms
from bigtrain.planner.plan import Plan, plan
from bigtrain.training.build import build_plan_model


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model in evaluation mode, with the tokenizer and the plan that made it."""

    model: Any
    tokenizer: Tokenizer
    plan: Plan


def load_trained(path: Path) -> TrainedModel:
    """Return the model of a run or checkpoint, on the CPU. Raises CheckpointError if there is none."""
    folder = find_checkpoint(path)
    made_by = plan(without_mechanisms(stored_recipe(folder)), cpu(), bounded=False)
    model: nn.Module = build_plan_model(made_by)
    load_weights(model, folder)
    tokenizer = open_tokenizer(folder / TOKENIZER)
    tokenizer.encode_special_tokens = False  # a [MASK] that the user writes is meant as one
    return TrainedModel(model.eval(), tokenizer, made_by)


@torch.no_grad()
def fill_masks(trained: TrainedModel, prompt: str, *, choices: int = 5) -> list[list[tuple[str, float]]]:
    """Return, for each [MASK] of a text, the likeliest tokens with their probabilities.

    Raises DataError if the text has no mask or is longer than the model reads.
    """
    tokenizer = trained.tokenizer
    ids = _ids(trained, prompt, special=True)
    mask = special_tokens(tokenizer).mask
    assert mask is not None  # the run was one of masked tokens
    masked = torch.eq(ids, mask).nonzero().squeeze(1)
    if not len(masked):
        raise DataError(f"--prompt: {prompt!r} has no [MASK]; put one where a word is to be guessed")
    logits = trained.model.logits(*_flat(ids), at=masked)
    best = logits.float().softmax(-1).topk(choices)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        [(str(tokenizer.id_to_token(i)), p) for i, p in zip(indices, values, strict=True)] for indices, values in rows
    ]


@torch.no_grad()
def continue_text(
    trained: TrainedModel, prompt: str, *, tokens: int = 60, temperature: float = 0.8, seed: int = 0
) -> str:
    """Return a text with what the model says comes next, until the document ends or so many tokens are there.

    Temperature 0 takes the likeliest token each time. Raises DataError if the text is longer than the model reads.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = _ids(trained, prompt, special=False)
    longest = trained.plan.model.max_position_embeddings
    end = special_tokens(trained.tokenizer).eos
    for _ in range(tokens):
        window = ids[-longest:]
        logits = trained.model.logits(*_flat(window), at=torch.tensor([len(window) - 1]))[0].float()
        chosen = _sample(logits, temperature, generator)
        if int(chosen) == end:
            break
        ids = torch.cat([ids, chosen])
    text: str = trained.tokenizer.decode(ids.tolist())
    return text


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax().unsqueeze(0)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


def _ids(trained: TrainedModel, prompt: str, *, special: bool) -> Tensor:
    ids = trained.tokenizer.encode(prompt, add_special_tokens=False).ids
    if special:
        marks = special_tokens(trained.tokenizer)
        ids = [token for token in (marks.bos, *ids, marks.eos) if token is not None]
    longest = trained.plan.model.max_position_embeddings
    if not ids or len(ids) > longest:
        raise DataError(f"--prompt: {len(ids)} tokens; give 1 to {longest}")
    return torch.tensor(ids)


def _flat(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)
