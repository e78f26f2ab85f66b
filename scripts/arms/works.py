"""The named works: shapes whose speed the README tells."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """A recipe with overrides, the rows of a micro-batch, micro-batches of a step, and the rows' kind."""

    recipe: str
    overrides: tuple[str, ...]
    rows: int
    accumulation: int = 1
    mode: str = "full"
    mean_length: int = 100
    checkpointing: bool = False
    """Whether the other arms recompute activations, without which they do not fit."""
    arms: tuple[str, ...] = ("bigtrain", "hf")
    rounds: int = 5
    steps: int = 15


SMALL = (
    "model.hidden_size=384", "model.num_hidden_layers=6", "model.num_attention_heads=6", "model.initializer_range=0.02",
    "data.vocab_size=8192", "data.sequence_length=256", "optimizer.learning_rate=3e-4", "train.dropout=0",
    "train.device=cpu",
)  # fmt: skip
MASKED = "train.masking_probability=0.15"
LOCAL_TEXT = ("data.source=embedded", "data.subset=null")
"""So that no work downloads anything."""

BERT_SMALL = Work("quickstart_bert", (*SMALL, MASKED), rows=16)
EVERY = ("bigtrain", "hf", "hf-compile", "hf-deepspeed", "plain")


def _on_gpu(recipe: str, length: int, *, rows: int, accumulation: int, checkpointing: bool = False) -> Work:
    """Return a shipped recipe in rows of so many tokens, on text that need not be downloaded."""
    keys = (*LOCAL_TEXT, f"data.sequence_length={length}", "train.device=cuda")
    return Work(recipe, keys, rows, accumulation, checkpointing=checkpointing, arms=EVERY, rounds=2, steps=8)


WORKS: dict[str, Work] = {
    "gpt-small-cpu": Work("quickstart_gpt", SMALL, rows=16),
    "bert-small-cpu": BERT_SMALL,
    "bert-small-cpu-documents": Work(BERT_SMALL.recipe, BERT_SMALL.overrides, rows=16, mode="documents"),
    "bert-large-512": _on_gpu("bert_large", 512, rows=64, accumulation=4),
    "bert-large-128": _on_gpu("bert_large", 128, rows=256, accumulation=4),
    "gpt2-124m": _on_gpu("gpt2_124m", 1024, rows=32, accumulation=8),
    "gpt2-xl": _on_gpu("gpt2_xl", 1024, rows=8, accumulation=16),
    "llama-7b": _on_gpu("gpt_7b", 2048, rows=2, accumulation=16, checkpointing=True),
}
"""The first three are for two cores, the others for one H200: `bigtrain plan` says that they fit it."""
