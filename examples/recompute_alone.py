"""Recomputation alone, on someone's model in someone's loop: less memory, and losses that are the same bit by bit.

Run it: python examples/recompute_alone.py [--layers 6] [--rows 8]
Nothing else of bigtrain is used: blocks are given, and the loop, the optimizer and the wrappers stay as they are.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from bigtrain import recompute
from bigtrain.memory.measure import measure
from bigtrain.units import format_bytes

WIDTH, LENGTH = 64, 64


class Block(nn.Module):
    """Attention and an MLP, with dropout: what is computed again drops the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down, self.drop = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.drop(self.attend(y, y, y, need_weights=False)[0])
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm2(x)))))


def train(policy: str, layers: int, x: Tensor, y: Tensor) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(layers)))
    recompute.apply(list(model), policy)  # the line that is new
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(3):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    x = torch.randn(args.rows, LENGTH, WIDTH)
    found: dict[str, list[float]] = {}
    for policy in ("none", "selective", "full"):

        def run(policy: str = policy) -> None:
            found[policy] = train(policy, args.layers, x, x.flip(1))

        peak = measure(run).peak_bytes
        same = "the same losses" if found[policy] == found["none"] else "OTHER LOSSES"
        print(f"{policy:10}{format_bytes(peak):>12} at the peak, {same}: {found[policy][-1]:.6f}")


if __name__ == "__main__":
    main()
