"""What a model says while it trains: the same texts each time, continued by a GPT, with some words hidden from a BERT.

The model runs as in an evaluation, on all ranks together, and chooses with random numbers of its own: the run stays bit
by bit what it is without samples. What it reads is at most one row of the training data, so that memory stays below a
step's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from bigtrain.batch import move
from bigtrain.data.corpus import Corpus
from bigtrain.data.loader import evaluation_batches
from bigtrain.data.tokenizer import open_tokenizer
from bigtrain.generation.choice import Choice, choose
from bigtrain.heartbeat import beat
from bigtrain.planner.plan import Plan
from bigtrain.training.metrics import cut_after

SAMPLES_FILE = "samples.jsonl"

TEXTS, LOOKED_AT = 2, 8
"""Documents that are continued, and the rows whose first ones are looked at for the longest."""
PROMPT_TOKENS, NEW_TOKENS = 16, 32
MASKED_TEXT_TOKENS, MASK_EVERY = 64, 8
"""Of the text that a BERT fills: how much of a document it is, and one token in how many is hidden."""

Row = dict[str, Any]
"""`step`, `prompt` and `text`; of a BERT also how many words were `masked`, and how many it guessed `right`."""


class Samples:
    """The texts of one run, of its validation split, and the file in its folder that samples are written to."""

    def __init__(self, plan: Plan, corpus: Corpus, folder: Path) -> None:
        self._file = folder / SAMPLES_FILE
        self._causal = plan.model.causal
        self._special = corpus.special_tokens
        self._tokenizer = open_tokenizer(corpus.tokenizer_file)
        self._choice = Choice(seed=plan.recipe.seed)
        self._room = plan.recipe.data.sequence_length
        self._texts = longest_texts(plan, corpus)

    def go_back(self, step: int) -> None:
        """Drop the samples of later steps, and a torn line."""
        cut_after(self._file, step)

    @torch.no_grad()
    def take(self, model: Any, step: int, device: torch.device) -> list[Row]:
        """Return the samples of a model after a step. All ranks call this together."""
        training = model.training
        model.eval()
        found = self._continued(model, device) if self._causal else self._filled(model, device)
        model.train(training)
        return [{"step": step, **row} for row in found]

    def write(self, rows: Sequence[Row]) -> None:
        """Append samples to the file; a disk that refuses them is told of, and does not end the run."""
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            print(f"warning: {self._file}: {error.strerror or error}; samples are lost", file=sys.stderr)

    def _continued(self, model: Any, device: torch.device) -> Iterator[Row]:
        """Continue the prompts side by side, equally many tokens on every rank."""
        room = self._room // TEXTS
        prompts = [text[: max(1, min(PROMPT_TOKENS, room // 2))] for text in self._texts[:TEXTS]]
        texts, generator = [list(prompt) for prompt in prompts], self._choice.generator()
        for _ in range(min(NEW_TOKENS, room - max(map(len, prompts)))):
            beat()
            logits_BV = model.logits(**move(flat(texts), device), at=_ends(texts).to(device))
            for text, token in zip(texts, choose(logits_BV, self._choice, generator), strict=True):
                text.append(token)
        for prompt, text in zip(prompts, texts, strict=True):
            added = text[len(prompt) :]
            if self._special.eos in added:
                added = added[: added.index(self._special.eos)]
            yield {"prompt": self._tokenizer.decode(prompt), "text": self._tokenizer.decode([*prompt, *added])}

    def _filled(self, model: Any, device: torch.device) -> Iterator[Row]:
        """Fill every so many words of a text with the likeliest."""
        text = self._texts[0][: min(MASKED_TEXT_TOKENS, self._room)]
        ordinary = [place for place, token in enumerate(text) if token not in self._special.ids]
        hidden = ordinary[MASK_EVERY // 2 :: MASK_EVERY] or ordinary[:1]
        asked = list(text)
        for place in hidden:
            asked[place] = self._special.mask or 0
        logits_MV = model.logits(**move(flat([asked]), device), at=torch.tensor(hidden, device=device))
        guesses = logits_MV.float().argmax(-1).tolist()
        filled = list(text)
        for place, guess in zip(hidden, guesses, strict=True):
            filled[place] = guess
        right = sum(filled[place] == text[place] for place in hidden)
        shown = (self._tokenizer.decode(ids, skip_special_tokens=False) for ids in (asked, filled))
        yield {**dict(zip(("prompt", "text"), shown, strict=True)), "masked": len(hidden), "right": right}


def longest_texts(plan: Plan, corpus: Corpus) -> list[list[int]]:
    """Return the token ids of some documents of the validation split, the longest first, the same ones in every run."""
    data = plan.recipe.data
    batches = evaluation_batches(
        corpus,
        objective="clm",  # rows as they are: nothing masked, no pairs
        sequence_length=data.sequence_length,
        packing=data.packing,
        micro_batch_size=LOOKED_AT,
        rows_limit=LOOKED_AT,
    )
    rows = next(iter(batches))
    lengths = rows["document_lengths"][:, 0].tolist()
    texts = [ids[:length].tolist() for ids, length in zip(rows["input_ids"], lengths, strict=True)]
    return sorted(texts, key=len, reverse=True)


def flat(texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return texts as the flat row that a model reads, in host memory."""
    lengths = [len(text) for text in texts]
    return {
        "input_ids": torch.tensor([token for text in texts for token in text]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }


def _ends(texts: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor(list(accumulate(map(len, texts)))) - 1


def describe_sample(rows: Sequence[Row]) -> str:
    """Return the first sample as a line for people."""
    first = rows[0]
    right = f", {first['right']} of {first['masked']} right" if "masked" in first else ""
    return f"sample at step {first['step']}{right}: {' '.join(first['text'].split())}"
