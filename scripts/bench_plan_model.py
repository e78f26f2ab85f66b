"""Hold what plan_model predicts of any model against real steps: five models, three policies, two sizes, two AdamWs.

    python scripts/bench_plan_model.py --output benchmarks/plan_model.json

Prints one row for each case and writes all of them, with versions, command and commit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bigtrain.profiling.model import profile_model

ROWS, LENGTH, WIDTH, HEADS, LAYERS, WORDS, CLASSES = 8, 48, 64, 4, 3, 384, 5
POLICIES = ("none", "selective", "full")
MICRO_BATCHES = (1, 2)
OPTIMIZERS = ("fused", "foreach")

Batch = dict[str, Tensor]


class Case(NamedTuple):
    """A model by its name, and how it is trained."""

    model: str
    policy: str
    micro_batches: int
    optimizer: str


class Mixer(nn.Module):
    """Mixes positions, then channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.positions = nn.LayerNorm(WIDTH), nn.Linear(LENGTH, LENGTH)
        self.channels = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(self.norm(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.channels(x)
        return out


class Classifier(nn.Module):
    """Blocks, one after another, and a head over their mean."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return functional.cross_entropy(self.head(x.mean(1)), labels)


def mixer() -> nn.Module:
    return Classifier(nn.ModuleList(Mixer() for _ in range(LAYERS)))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.1, batch_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    return Classifier(nn.ModuleList(encoder.layers))


def bert() -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 2 * WIDTH}
    config = transformers.BertConfig(vocab_size=WORDS, num_attention_heads=HEADS, **sizes)
    return transformers.BertForMaskedLM(config)


def gpt2() -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LENGTH}
    config = transformers.GPT2Config(vocab_size=WORDS, use_cache=False, bos_token_id=0, eos_token_id=0, **sizes)
    config.loss_type = "ForCausalLM"  # its name, which transformers looks for, and would warn about
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 172}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=WORDS, use_cache=False, **sizes))


def vectors() -> Batch:
    return {"x": torch.randn(ROWS, LENGTH, WIDTH), "labels": torch.randint(0, CLASSES, (ROWS,))}


def words(*, masked: bool = False) -> Batch:
    ids = torch.randint(0, WORDS, (ROWS, LENGTH))
    return {"input_ids": ids, "labels": ids, **({"attention_mask": torch.ones_like(ids)} if masked else {})}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "mixer": (mixer, vectors),
    "nn.TransformerEncoder": (encoder, vectors),
    "transformers BERT": (bert, partial(words, masked=True)),
    "transformers GPT-2": (gpt2, words),
    "transformers Llama": (llama, words),
    "transformers Llama with a mask": (llama, partial(words, masked=True)),
}


def cases() -> Iterator[Case]:
    """Yield the whole grid."""
    for name in MODELS:
        for policy in POLICIES:
            for micro_batches in MICRO_BATCHES:
                for optimizer in OPTIMIZERS:
                    yield Case(name, policy, micro_batches, optimizer)


def run(case: Case) -> dict[str, Any]:
    """Return a case with the peak predicted and measured."""
    torch.manual_seed(0)
    make, sample = MODELS[case.model]
    options: dict[str, Any] = {case.optimizer: True}
    found = profile_model(
        make(),
        sample(),
        micro_batch_size=ROWS // case.micro_batches,
        recompute=case.policy,
        optimizer=partial(torch.optim.AdamW, **options),
        device="cpu",
        causal=make in (gpt2, llama),
    )
    return {
        **case._asdict(),
        "predicted_bytes": found.predicted.memory.allocated_bytes_peak,
        "measured_bytes": found.measured.memory.allocated_bytes_peak,
        "relative_error": found.relative_error,
    }


def main() -> None:
    """Run the grid and write what it found."""
    from provenance import provenance

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    rows = []
    for case in cases():
        rows.append(run(case))
        print(f"{rows[-1]['relative_error']:+.4%}", *case, file=sys.stderr, flush=True)
    errors = [abs(row["relative_error"]) for row in rows]
    summary = {"cases": len(rows), "median_error": median(errors), "largest_error": max(errors)}
    output.write_text(json.dumps({"summary": summary, "rows": rows, **provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
