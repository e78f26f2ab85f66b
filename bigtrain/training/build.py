"""From a plan to its model, its engine and its rows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress

import torch
from torch import nn
from torch.optim import Optimizer

from bigtrain.data.corpus import Corpus
from bigtrain.data.loader import Loader
from bigtrain.engine import Engine
from bigtrain.memory.layout import layout_of
from bigtrain.models.build import build_model
from bigtrain.optim.build import build_optimizer
from bigtrain.placement import find_blocks
from bigtrain.planner.plan import Plan
from bigtrain.preparation import prepare
from bigtrain.world import ALONE, World


def build_loader(plan: Plan, corpus: Corpus, world: World = ALONE) -> Loader:
    """Return a rank's training rows of a corpus, as a plan's recipe says."""
    recipe = plan.recipe
    rank, ranks = world.reading(recipe.sharding.tensor_parallel)
    return Loader(
        corpus,
        split="train",
        objective=recipe.train.objective,
        sequence_length=recipe.data.sequence_length,
        packing=recipe.data.packing,
        masking_probability=recipe.train.masking_probability,
        whole_word_masking=recipe.train.whole_word_masking,
        global_batch_size=recipe.train.global_batch_size,
        seed=recipe.seed,
        rank=rank,
        world_size=ranks,
    )


def build_engine(plan: Plan) -> Engine:
    """Return the engine of a plan's own model, initialised from the recipe's seed."""
    with torch.device("meta"):
        model = build_plan_model(plan)

    in_blocks = {id(p) for block in find_blocks(model) for p in block.parameters() if p.ndim == 2}
    are_matrices = [id(p) in in_blocks for p in model.parameters()]

    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        held = list(parameters)
        matrices = list(compress(held, are_matrices))
        kept, sharded = plan.recipe.amp.master_weights, layout_of(plan.recipe, plan.world_size).shards > 1
        sharded = sharded and plan.recipe.sharding.engine != "deepspeed"  # which gives flat tensors of its own
        return build_optimizer(held, plan.recipe.optimizer, master_weights=kept, matrices=matrices, sharded=sharded)

    return prepare(model, plan, optimizer)


def build_plan_model(plan: Plan) -> nn.Module:
    """Return a plan's model, on the device that is current."""
    section = plan.recipe.train
    model = build_model(
        plan.model,
        dropout=section.dropout,
        attention_dropout=section.attention_dropout,
        z_loss=section.z_loss,
        label_smoothing=section.label_smoothing,
    )
    model.loss_chunk_tokens = plan.loss_chunk_tokens
    return model
