"""What is found before the arms run: the machine, the model, and the weights that all arms start from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from arms.job import Job
from arms.rows import Source

LARGEST_SHARED = 500_000_000
"""Parameters; larger models are drawn by each arm itself, and their losses are not compared."""

OURS, CONFIG, THEIRS = "ours.safetensors", "config.json", "model.safetensors"


def facts(job: Job) -> dict[str, Any]:
    """Measure the device's rate, write the weights to the job's folder, and return what every line says."""
    from bigtrain.data.cache import cache_folder
    from bigtrain.models.shape import flops_per_token
    from bigtrain.planner.settle import labelled_fraction
    from bigtrain.planner.speed import Speed
    from bigtrain.training.peak import peak_flops

    plan = job.plan()
    precision, hardware = plan.recipe.amp.precision, plan.hardware
    measured = peak_flops(hardware, precision, cache_folder(plan.recipe.data))
    plan = job.plan()  # by what has just been measured
    length = Source(plan, job).attended_length()
    shared = plan.parameters <= LARGEST_SHARED
    if shared:
        write_weights(plan, Path(job.folder))
    row = hardware.device
    return {
        "hardware": machine(plan),
        "precision": precision,
        "dropout": plan.recipe.train.dropout,
        "attention_dropout": plan.recipe.train.attention_dropout,
        "parameters": plan.parameters,
        "flops_per_token": flops_per_token(plan.model, length, labelled_fraction(plan.recipe)),
        "attended_length": length,
        "same_weights": shared,
        "peak_flops_per_second": row.flops_per_second.get(precision) if row and row.kind == "cuda" else None,
        "measured_flops_per_second": measured,
        "predicted_tokens_per_second": plan.tokens_per_step / plan.seconds.total,
        "rates": Speed(plan.recipe, plan.model, hardware, 1).source,
    }


def machine(plan: Any) -> dict[str, Any]:
    """Return the device, its memory, and the cores and threads of the host."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "kind": plan.hardware.kind,
        "name": plan.hardware.name,
        "memory_bytes": plan.hardware.memory_bytes,
        "cores": cores,
        "threads": torch.get_num_threads(),
    }


def write_weights(plan: Any, folder: Path) -> None:
    """Write the weights that bigtrain starts from: under its own names, and as a Hugging Face folder."""
    import torch
    from safetensors.torch import save_file

    from bigtrain.models.hf import to_hugging_face
    from bigtrain.placement import place
    from bigtrain.training.build import build_plan_model

    with torch.device("meta"):
        model = build_plan_model(plan)
    place(model, torch.device(plan.hardware.kind), seed=plan.recipe.seed)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    config, tensors = to_hugging_face(plan.model, state)
    save_file(state, folder / OURS)
    save_file(tensors, folder / THEIRS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config | their_dropout(plan)), encoding="utf-8")


def their_dropout(plan: Any) -> dict[str, float]:
    """Return what a plan drops by the keys of transformers' configurations, whose own default is 0.1."""
    dropout, of_attention = plan.recipe.train.dropout, plan.recipe.train.attention_dropout
    if plan.model.family == "llama":
        return {"attention_dropout": of_attention}
    if plan.model.family == "bert":
        return {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": of_attention}
    return {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": of_attention}
