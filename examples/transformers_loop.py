"""A model of transformers in a plain loop, and in bigtrain's: the lines that change, and what memory they save.

Run it: python examples/transformers_loop.py [--layers 4] [--width 128] [--steps 4] [--micro 2]
Both loops train a small GPT-2 on random tokens. The second one is planned and cuts the batch into micro-batches; its
losses are those of the first. With memory_budget="24GiB" in place of a size, the plan finds the fastest that fits.
`pip install bigtrain[hf]`; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import bigtrain
from bigtrain.memory.measure import measure
from bigtrain.units import format_bytes

ROWS, LENGTH, WORDS = 16, 128, 512
Batch = dict[str, torch.Tensor]


def build(layers: int, width: int) -> torch.nn.Module:
    config = GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_layer=layers, n_embd=width, n_head=4, use_cache=False,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    config.loss_type = "ForCausalLM"
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).train()


def before(model: torch.nn.Module, batch: Batch, steps: int) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def after(model: torch.nn.Module, batch: Batch, steps: int, micro_batch_size: int) -> list[float]:
    optimizer, losses = partial(torch.optim.AdamW, lr=1e-3), []  # 1: what makes one
    plan = bigtrain.plan_model(  # 2: tried on tensors that have no memory
        model, batch, global_batch_size=ROWS, micro_batch_size=micro_batch_size, optimizer=optimizer, causal=True,
        device="cpu",
    )  # fmt: skip
    print(f"plan: micro-batches of {plan.micro_batch_size}, recompute {', '.join(plan.choice.recompute)}")
    engine = bigtrain.prepare(model, plan, optimizer)  # 3
    for _ in range(steps):
        for micro in engine.micro_batches(batch):  # 4
            engine.backward(engine.model(**micro))  # 5, 6
        result = engine.step(max_norm=1.0)  # 7: clips and updates
        losses.append(result.loss.item())  # 8: of the whole batch, on all ranks
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, number in (("--layers", 4), ("--width", 128), ("--steps", 4), ("--micro", 2)):
        parser.add_argument(name, type=int, default=number)
    args = parser.parse_args()
    ids = torch.randint(0, WORDS, (ROWS, LENGTH))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    found: list[list[float]] = []
    plain, planned = build(args.layers, args.width), build(args.layers, args.width)
    peaks = [
        measure(lambda: found.append(before(plain, batch, args.steps))).peak_bytes,
        measure(lambda: found.append(after(planned, batch, args.steps, args.micro))).peak_bytes,
    ]
    for name, peak, losses in zip(("before", "after"), peaks, found, strict=True):
        print(f"{name:6}  {format_bytes(peak)} at the peak  losses {' '.join(f'{loss:.5f}' for loss in losses)}")


if __name__ == "__main__":
    main()
