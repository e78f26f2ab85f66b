"""What a trained model says: a GPT continues a text, a BERT fills its masks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from bigtrain.checkpoint.resume import stored_recipe
from bigtrain.checkpoint.state import TOKENIZER, load_weights
from bigtrain.checkpoint.store import find_checkpoint
from bigtrain.data.tokenizer import open_tokenizer, special_tokens
from bigtrain.data.vocabulary import SPECIAL_NAMES
from bigtrain.errors import DataError
from bigtrain.generation.choice import Choice
from bigtrain.generation.continuation import continue_rows
from bigtrain.models.hf_config import GENERATION_CONFIG, kept_config, token_ids
from bigtrain.planner.hardware import cpu
from bigtrain.planner.mechanisms import without_mechanisms
from bigtrain.planner.plan import Plan, plan
from bigtrain.training.build import build_plan_model

USUAL = Choice()


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model in evaluation mode, the plan that made it, and the folder that it came from."""

    model: Any
    plan: Plan
    folder: Path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return its tokenizer, which reads a [MASK] that the user writes as one. Raises DataError without one."""
        file = self.folder / TOKENIZER
        if not file.is_file():
            raise DataError(f"{file}: no such file; put the tokenizer there that the model was trained with")
        tokenizer = open_tokenizer(file)
        tokenizer.encode_special_tokens = False
        return tokenizer

    @cached_property
    def source(self) -> dict[str, Any]:
        """Return the config.json that an imported folder came with, {} of a run."""
        return kept_config(self.folder)

    @property
    def ends(self) -> frozenset[int]:
        """Return the tokens that end a text.

        Those that an imported generation_config.json names, as in transformers; else its config.json; else the
        tokenizer's.
        """
        size = self.plan.model.vocab_size
        for config in (kept_config(self.folder, GENERATION_CONFIG), self.source):
            if named := token_ids(config.get("eos_token_id"), size):
                return frozenset(named)
        end = special_tokens(self.tokenizer).eos
        return frozenset([] if end is None else [end])


def load_trained(path: Path) -> TrainedModel:
    """Return the model of a run, a checkpoint or an imported folder, on the CPU. Raises CheckpointError for others."""
    folder = find_checkpoint(path)
    made_by = plan(without_mechanisms(stored_recipe(folder)), cpu(), bounded=False)
    model: nn.Module = build_plan_model(made_by)
    load_weights(model, folder)
    return TrainedModel(model.eval(), made_by, folder)


@torch.no_grad()
def fill_masks(trained: TrainedModel, prompt: str, *, choices: int = 5) -> list[list[tuple[str, float]]]:
    """Return, for each [MASK] of a text, the likeliest tokens with their probabilities.

    Raises DataError if the text or the tokenizer has no mask, or the text is longer than the model reads.
    """
    tokenizer = trained.tokenizer
    ids = _ids(trained, prompt)
    mask = special_tokens(tokenizer).mask
    if mask is None:
        known = ", ".join(SPECIAL_NAMES["mask"])
        raise DataError(f"{trained.folder / TOKENIZER}: has none of the masks {known}; name a model that has one")
    masked = torch.eq(ids, mask).nonzero().squeeze(1)
    if not len(masked):
        text = f"{prompt!r} has no {tokenizer.id_to_token(mask)}; put one where a word is to be guessed"
        raise DataError(f"command line: --prompt: {text}")
    logits = trained.model.logits(*_flat(ids), at=masked)
    best = logits.float().softmax(-1).topk(min(choices, trained.plan.model.vocab_size))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        [(str(tokenizer.id_to_token(i)), p) for i, p in zip(indices, values, strict=True)] for indices, values in rows
    ]


@dataclass(frozen=True)
class Continuation:
    """Texts with what follows; how many tokens that is over all, and how long it took, reading included.

    `kept` is how many tokens a text went on from where it filled what the model reads at once, None where none did.
    """

    texts: list[str]
    tokens: int
    seconds: float
    kept: int | None


def continue_texts(
    trained: TrainedModel, prompts: Sequence[str], *, tokens: int = 60, choice: Choice = USUAL
) -> Continuation:
    """Return texts with what the model says comes next, until their document ends or so many tokens are there.

    They are continued side by side, and none knows of the others. Raises DataError for a text that is empty or longer
    than the model reads.
    """
    rows = [_ids(trained, prompt).tolist() for prompt in prompts]
    begun = time.monotonic()
    found = continue_rows(trained.model, rows, tokens=tokens, choice=choice, ends=trained.ends)
    seconds = time.monotonic() - begun
    added = sum(map(len, found.rows)) - sum(map(len, rows))
    return Continuation([trained.tokenizer.decode(row) for row in found.rows], added, seconds, found.kept)


def continue_text(
    trained: TrainedModel, prompt: str, *, tokens: int = 60, temperature: float = 0.8, seed: int = 0
) -> str:
    """Return one text with what follows; temperature 0 takes the likeliest token each time."""
    choice = Choice(temperature=temperature, seed=seed)
    return continue_texts(trained, [prompt], tokens=tokens, choice=choice).texts[0]


def _ids(trained: TrainedModel, prompt: str) -> Tensor:
    """Return a text's tokens as the model was trained to read them.

    BERT's stand between two marks. A decoder of ours was given no mark at the start; one that was imported gets those
    that its tokenizer adds there. None gets any at the end, where the text is to go on.
    """
    if not trained.plan.model.causal:
        marks = special_tokens(trained.tokenizer)
        inner = trained.tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = [token for token in (marks.bos, *inner, marks.eos) if token is not None]
    else:
        found = trained.tokenizer.encode(prompt, add_special_tokens=bool(trained.source))
        added = found.special_tokens_mask
        ids = found.ids[: next((place for place in range(len(added), 0, -1) if not added[place - 1]), 0)]
    longest = trained.plan.model.max_position_embeddings
    if not ids or len(ids) > longest:
        raise DataError(f"command line: --prompt: {len(ids)} tokens; give 1 to {longest}")
    return torch.tensor(ids)


def _flat(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)
