"""A vision transformer in plain torch, planned and trained on random images: nothing in bigtrain is for text only.

Run it: python examples/vision_transformer.py [--layers 3] [--rows 16] [--budget 600MiB]
A batch without labels of tokens is weighed by its rows.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

import bigtrain
from bigtrain.units import format_bytes

SIDE, PATCH, WIDTH, CLASSES = 32, 8, 64, 10


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.places = nn.Embedding((SIDE // PATCH) ** 2, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor, kinds: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x).mean(1)), kinds)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, number in (("--layers", 3), ("--rows", 16), ("--steps", 8)):
        parser.add_argument(name, type=int, default=number)
    parser.add_argument("--budget", default="auto", help="what the process may hold, libraries included")
    args = parser.parse_args()
    torch.manual_seed(0)
    batch = {"images": torch.randn(args.rows, 3, SIDE, SIDE), "kinds": torch.randint(0, CLASSES, (args.rows,))}
    with torch.device("meta"):
        model = VisionTransformer(args.layers)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    plan = bigtrain.plan_model(
        model, batch, global_batch_size=args.rows, memory_budget=args.budget, optimizer=optimizer, device="cpu"
    )
    print(f"plan: micro-batches of {plan.micro_batch_size}, {format_bytes(plan.memory.device_bytes_peak or 0)}")
    engine = bigtrain.prepare(model, plan, optimizer)
    for step in range(1, args.steps + 1):
        for micro in engine.micro_batches(batch):
            engine.backward(engine.model(**micro))
        print(f"step {step}: loss {engine.step().loss.item():.5f}")


if __name__ == "__main__":
    main()
