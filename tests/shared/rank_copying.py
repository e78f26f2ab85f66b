"""A rank that trains twice, saving in the background and waiting for its saves: `rank_copying.py RECIPE FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import bigtrain
from bigtrain.training import saving

CHANGES = ["train.device=cpu", "train.micro_batch_size=2", "sharding.zero_stage=1", "checkpoint.every_steps=2"]


def main(recipe: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    plan = bigtrain.plan(bigtrain.load_recipe(recipe, [*CHANGES, "cluster.devices_per_node=2"]))
    for name, copies in (("copying", True), ("waiting", False)):
        saving.copies_first = lambda _, copies=copies: copies
        bigtrain.train(plan, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
