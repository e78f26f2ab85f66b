"""The planner alone: what fits where, how fast, and what it would cost to use less. Nothing is trained.

Run it: python examples/planner_alone.py [--recipe gpt2_124m] [--devices rtx4090,h100] [--world-size 8]
The first table needs no torch and no GPU. The second is of a model that no recipe describes, traced on tensors that
have shapes and no memory.
"""

from __future__ import annotations

import argparse

import bigtrain
from bigtrain.planner.settle import named_hardware
from bigtrain.units import format_bytes


def what_fits(recipe_name: str, devices: list[str], world_size: int) -> None:
    """Print the fastest choice for a recipe on each device."""
    recipe = bigtrain.load_recipe(recipe_name, ["data.source=embedded"])
    print(f"{recipe_name} on {world_size} ranks")
    for device in devices:
        try:
            plan = bigtrain.plan(recipe, named_hardware(recipe, device), world_size=world_size)
        except bigtrain.DoesNotFit as error:
            print(f"  {device:14} does not fit: {error}")
            continue
        choice, memory = plan.choice, plan.memory.device_bytes_peak or 0
        policies = "/".join(sorted(set(choice.recompute)))
        print(
            f"  {device:14} {format_bytes(memory):>10}  {plan.tokens_per_second:>10,.0f} tokens/s  "
            f"micro-batch {choice.micro_batch_size}, recompute {policies}, ZeRO {choice.zero_stage}"
        )


def any_model(device: str, budgets: list[str]) -> None:
    """Print how a model of one's own fits smaller and smaller budgets."""
    import torch
    from torch import nn

    with torch.device("meta"):
        layers = [nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True) for _ in range(4)]
        model = nn.Sequential(*layers)
    sample = {"x": torch.zeros(2, 128, 256)}
    print(f"{len(layers)} layers of torch's own transformer on {device}")
    for budget in budgets:
        try:
            plan = bigtrain.plan_model(
                model, sample, global_batch_size=32, memory_budget=budget, device=device, blocks=list(model),
                forward=lambda module, batch: module(batch["x"]).square().mean(),
            )  # fmt: skip
        except bigtrain.DoesNotFit as error:
            print(f"  {budget:>8}: {error}")
            continue
        policies, seconds = ", ".join(plan.choice.recompute), plan.seconds.total
        print(f"  {budget:>8}: micro-batch {plan.micro_batch_size}, recompute {policies}: {seconds:.4f} s a step")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="gpt2_124m")
    parser.add_argument("--devices", default="rtx4090,a100-80gb,h100")
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--budgets", default="8GiB,1GiB,600MiB")
    args = parser.parse_args()
    devices = args.devices.split(",")
    what_fits(args.recipe, devices, args.world_size)
    any_model(devices[0], args.budgets.split(","))


if __name__ == "__main__":
    main()
