"""A decoder in torchtitan's manner, fully sharded by `prepare`: layers in a ModuleDict, a table, `init_weights`.

Run it: python examples/torchtitan_like.py [LAYERS STEPS], or on two ranks:
torchrun --nproc-per-node 2 examples/torchtitan_like.py
The model is built on the meta device, and `prepare` calls `init_weights`. Losses do not depend on the number of ranks.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

import bigtrain

ROWS, LENGTH, WORDS, WIDTH, HEADS = 8, 32, 128, 64, 4
linear = partial(nn.Linear, bias=False)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.wqkv, self.wo = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.w1, self.w2 = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        q, k, v = self.wqkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)
        q, k = rotate(q, freqs_cis), rotate(k, freqs_cis)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(heads.transpose(1, 2).flatten(2))
        return x + self.w2(functional.silu(self.w1(self.ffn_norm(x))))


class Decoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tok_embeddings, self.norm = nn.Embedding(WORDS, WIDTH), nn.RMSNorm(WIDTH)
        self.layers = nn.ModuleDict({str(number): Layer() for number in range(layers)})
        self.output = linear(WIDTH, WORDS)
        self.register_buffer("freqs_cis", frequencies(), persistent=False)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        with torch.device(buffer_device or self.freqs_cis.device):
            self.freqs_cis = frequencies()
        for name, weight in self.named_parameters():
            nn.init.ones_(weight) if "norm" in name else nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x, self.freqs_cis)
        return functional.cross_entropy(self.output(self.norm(x)).flatten(0, 1), labels.flatten())


def frequencies() -> Tensor:  # cosines and sines (length, half a head, 2) of the rotary positions
    angles = torch.outer(torch.arange(LENGTH).float(), 10000.0 ** -torch.linspace(0, 1, WIDTH // HEADS // 2))
    return torch.stack([angles.cos(), angles.sin()], -1)


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    (a, b), (cos, sin) = x.chunk(2, -1), freqs_cis.unbind(-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def main(layers: int, steps: int) -> None:
    tokens = torch.randint(0, WORDS, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    whole = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    with bigtrain.joined(kind="cpu") as world:
        with torch.device("meta"):
            model = Decoder(layers)
        spread = {"world_size": world.size, "zero_stage": 3 if world.size > 1 else None}
        plan = bigtrain.plan_model(model, whole, global_batch_size=ROWS, optimizer=optimizer, device="cpu", **spread)
        engine = bigtrain.prepare(model, plan, optimizer)
        mine = {name: rows.chunk(world.size)[world.rank] for name, rows in whole.items()}
        for step in range(1, steps + 1):
            for micro in engine.micro_batches(mine):
                engine.backward(engine.model(**micro))
            loss = engine.step().loss.item()
            if world.first:
                print(f"step {step}: loss {loss:.5f}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or (2, 4)))
