"""The arm `plain`: a training loop by hand, with what a good engineer writes in an hour.

torch.compile of the whole model, scaled_dot_product_attention, bf16 autocast, fused AdamW, logits of BERT at masked
positions only, those padded to one count so that shapes are static. Rows of documents lie end to end, without padding,
and attend across documents.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arms.clock import Clock
from arms.facts import OURS
from arms.job import CannotRun, Job
from arms.plain_model import Shape, make
from arms.rows import IGNORED, Source

MOST_MASKED = 1.3
"""Places for masked positions, of the mean count: random masking exceeds that in no micro-batch of some thousand."""


def run(job: Job) -> dict[str, Any]:
    """Train as the job says."""
    plan = job.plan()
    recipe, config = plan.recipe, plan.model
    if config.family == "llama":
        raise CannotRun("the model by hand is BERT or GPT-2")
    if recipe.amp.precision not in ("fp32", "bf16"):
        raise CannotRun(f"amp.precision={recipe.amp.precision}; the arms are compared in fp32 and bf16")
    device = torch.device(plan.hardware.kind)
    model = _model(plan, job).to(device)
    optimizer = _optimizer(model, recipe.optimizer)
    compiled = torch.compile(model)
    low = recipe.amp.precision == "bf16"
    clock, tokens = Clock(device.type, job.steps), []
    for ids, labels, count in Source(plan, job).end_to_end():
        loss = torch.zeros((), device=device)
        for micro in zip(torch.split(ids, job.rows), torch.split(labels, job.rows), strict=True):
            inputs = [part.to(device, non_blocking=True) for part in _inputs(*micro, recipe, config.causal)]
            with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
                part = compiled(*inputs) / job.accumulation
            part.backward()
            loss += part.detach()
        if recipe.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens.append(count)
        clock.step(loss)
    return clock.result(tokens)


def _model(plan: Any, job: Job) -> torch.nn.Module:
    config = plan.model
    model = make(
        Shape(
            bert=config.family == "bert",
            width=config.hidden_size,
            blocks=config.num_hidden_layers,
            heads=config.num_attention_heads,
            inner=config.intermediate_size,
            vocabulary=config.padded_vocab_size,
            positions=config.max_position_embeddings,
            eps=config.norm_eps,
            dropout=plan.recipe.train.dropout,
        )
    )
    weights = Path(job.folder) / OURS
    if weights.is_file():
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights))
    return model


def _optimizer(model: torch.nn.Module, section: Any) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True)


def _inputs(ids: Tensor, labels: Tensor, recipe: Any, causal: bool) -> list[Tensor]:
    """Return what the model reads: ids and labels, for BERT also the positions in the flattened rows with a label."""
    if causal:
        return [ids, labels]
    places = (labels.flatten() != IGNORED).nonzero().squeeze(1)
    room = int(MOST_MASKED * recipe.train.masking_probability * labels.numel()) + 8 - len(places)
    found = torch.nn.functional.pad(labels.flatten()[places], (0, room), value=IGNORED)
    return [ids, found, torch.nn.functional.pad(places, (0, room))]
