"""What scripts/bench_speed.py measures: cases that the rates were fitted to, and cases held out from that."""

from __future__ import annotations


def shape(family: str, width: int, blocks: int, length: int, rows: int, vocabulary: int, *more: str) -> list[str]:
    """Return overrides of a quickstart recipe."""
    return [
        *(f"model.{key}={value}" for key, value in (("hidden_size", width), ("num_hidden_layers", blocks))),
        f"model.num_attention_heads={max(2, width // 64)}",
        f"model.family={family}",
        f"train.objective={'mlm' if family == 'bert' else 'clm'}",
        f"data.vocab_size={vocabulary}",
        f"data.sequence_length={length}",
        f"train.global_batch_size={rows}",
        *more,
    ]


LOW = ("amp.precision=bf16", "amp.master_weights=split24", "optimizer.state=8bit")
DROPOUT = "train.dropout=0.1"

FITTED: dict[str, tuple[list[str], list[int]]] = {
    "gpt-256": (shape("gpt", 256, 3, 128, 8, 2048), [1, 2, 8]),
    "bert-256-dropout": (shape("bert", 256, 3, 128, 8, 4096, DROPOUT), [1, 2, 8]),
    "bert-384-low": (shape("bert", 384, 2, 128, 4, 4096, *LOW), [1, 4]),
    "gpt-128-long": (shape("gpt", 128, 2, 512, 4, 1024), [1, 4]),
    "llama-256": (shape("llama", 256, 3, 128, 4, 2048), [1, 4]),
    "gpt-384-4bit": (shape("gpt", 384, 2, 256, 2, 2048, "optimizer.state=4bit"), [1, 2]),
    "bert-512": (shape("bert", 512, 2, 128, 4, 4096), [1, 4]),
    "gpt-512-lamb": (shape("gpt", 512, 2, 128, 4, 2048, "optimizer.name=lamb"), [1, 4]),
}
"""With the micro-batches that are tried, each with one policy for all blocks: what constants were fitted to."""

HELD_OUT: dict[str, list[str]] = {
    "quickstart-bert": shape("bert", 128, 2, 128, 8, 4096, "model.num_attention_heads=4"),
    "quickstart-gpt": shape("gpt", 128, 2, 128, 8, 4096, "model.num_attention_heads=4"),
    "gpt-192": shape("gpt", 192, 2, 96, 4, 6000),
    "bert-320-dropout": shape("bert", 320, 2, 160, 4, 3000, DROPOUT),
    "llama-256-grouped": shape("llama", 256, 2, 192, 4, 5000, "model.num_key_value_heads=2"),
    "gpt-320-lamb": shape("gpt", 320, 2, 128, 4, 3000, "optimizer.name=lamb"),
    "bert-192-muon": shape("bert", 192, 2, 128, 4, 3000, "optimizer.name=muon"),
    "llama-192-adafactor": shape("llama", 192, 2, 128, 4, 3000, "optimizer.name=adafactor"),
    "gpt-192-8bit": shape("gpt", 192, 2, 128, 4, 3000, "optimizer.state=8bit"),
    "bert-256-4bit": shape("bert", 256, 2, 96, 4, 2000, "optimizer.state=4bit", DROPOUT),
    "gpt-256-release": shape(
        "gpt", 256, 2, 128, 4, 3000, "optimizer.gradient_release=auto", "train.max_grad_norm=null"
    ),
    "gpt-192-low": shape("gpt", 192, 2, 192, 4, 3000, *LOW),
    "gpt-128-1024": shape("gpt", 128, 2, 1024, 4, 1500),
}
"""Every choice that the planner has is measured. Nothing is fitted to these: a case that is moves to the fitted."""
