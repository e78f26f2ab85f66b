"""What DeepSpeed is told, made of a recipe, and what a recipe may not ask of it. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from bigtrain.config.keys import listed, show
from bigtrain.config.schema import Recipe
from bigtrain.config.shape_checks import fault
from bigtrain.errors import Fault

INSTALL = "pip install bigtrain[deepspeed]"

SUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "sharding.zero_stage": ((1, 2, 3), "without a stage DeepSpeed shards nothing, which fsdp2 does as well"),
    "sharding.replicate": ((1,), "DeepSpeed shards over all ranks"),
    "sharding.tensor_parallel": ((1,), "its tensor parallelism knows no models of bigtrain"),
    "optimizer.name": (("adamw",), "DeepSpeed cuts parameters anywhere, and others need rows or whole tensors"),
    "optimizer.state": (("fp32",), "low-bit states have blocks, and DeepSpeed cuts anywhere"),
    "optimizer.gradient_release": ((False,), "DeepSpeed keeps gradients until the last one is reduced"),
    "amp.precision": (("fp32", "bf16", "fp16"), "its masters are those of whole tensors in two bytes or four"),
    "amp.master_weights": (("fp32",), "DeepSpeed keeps masters of its own, fp32"),
    "train.on_spike": (("stop", "rollback", "ignore"), "DeepSpeed updates before the loss of all ranks is known"),
    "recompute.policy": (("none", "selective", "full"), "two libraries would move tensors to the host"),
    "train.compile": ((False,), "DeepSpeed fetches parameters in hooks that compiled blocks would break at"),
}
"""The values that work under DeepSpeed, by key, and why no other does. A plan's `auto` becomes one of them."""

OFFLOADED: dict[int, tuple[str, ...]] = {
    1: ("none", "optimizer"),
    2: ("none", "optimizer"),
    3: ("none", "optimizer", "all", "nvme"),
}
"""`sharding.offload` by stage: only whole parameters that are gathered anew can lie elsewhere (ZeRO-Infinity)."""

LARGEST_BUCKET = 50_000_000
"""Elements that are reduced together. DeepSpeed has a buffer of so many from the start on: 5e8 unless told, 2 GB."""


def deepspeed_faults(recipe: Recipe, *, installed: bool | None = None) -> list[Fault]:
    """Return what contradicts in a recipe that names DeepSpeed, or that asks of another engine what it alone does.

    `auto` is no fault. `installed` says whether the library is there; without it, it is looked for.
    """
    section = recipe.sharding
    if section.nvme_path is not None and section.offload not in ("nvme", "auto"):
        text = f"does nothing with sharding.offload={section.offload}; use null, or sharding.offload=nvme"
        return [fault(recipe, "sharding.nvme_path", text, "sharding.offload")]
    if section.engine != "deepspeed":
        if section.offload != "nvme":
            return []
        text = "'nvme' is DeepSpeed's; use all, or sharding.engine=deepspeed"
        return [fault(recipe, "sharding.offload", text, "sharding.engine")]
    if not (find_spec("deepspeed") is not None if installed is None else installed):
        text = f"'deepspeed' is not installed; install it ({INSTALL}) or use fsdp2"
        return [fault(recipe, "sharding.engine", text)]
    return [*_unsupported(recipe), *_offload_faults(recipe)]


def narrowed(recipe: Recipe) -> Recipe:
    """Return a recipe in which `auto` stands only where DeepSpeed leaves a choice; of other engines' as it is."""
    if recipe.sharding.engine != "deepspeed":
        return recipe
    settled: dict[str, dict[str, object]] = {}
    for key, (values, _) in SUPPORTED.items():
        section, _, name = key.partition(".")
        if len(values) == 1 and getattr(getattr(recipe, section), name) == "auto":
            settled.setdefault(section, {})[name] = values[0]
    changed = {section: getattr(recipe, section).model_copy(update=keys) for section, keys in settled.items()}
    return recipe.model_copy(update=changed)


def _unsupported(recipe: Recipe) -> Iterator[Fault]:
    for key, (values, reason) in SUPPORTED.items():
        section, _, name = key.partition(".")
        given = getattr(getattr(recipe, section), name)
        for value in given if isinstance(given, list) else [given]:
            if value != "auto" and not any(value == known and type(value) is type(known) for known in values):
                use = listed(show(key, known) for known in values)
                text = f"{show(key, value)} does not go with sharding.engine=deepspeed: {reason}; use {use}, or fsdp2"
                yield fault(recipe, key, text, "sharding.engine")
                break


def _offload_faults(recipe: Recipe) -> Iterator[Fault]:
    stage, offload = recipe.sharding.zero_stage, recipe.sharding.offload
    if stage in OFFLOADED and offload not in ("auto", *OFFLOADED[int(stage)]):
        text = f"{offload!r} needs parameters that are sharded; use {listed(OFFLOADED[int(stage)])}, or zero_stage 3"
        yield fault(recipe, "sharding.offload", text, "sharding.zero_stage", "sharding.engine")
    if offload == "nvme" and recipe.sharding.nvme_path is None:
        text = "missing; name a folder on the NVMe drive for sharding.offload=nvme, on every node the same"
        yield fault(recipe, "sharding.nvme_path", text, "sharding.offload")


def deepspeed_config(
    recipe: Recipe, *, micro_batch_size: int, accumulation_steps: int, parameters: int, pinned: bool
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a recipe without `auto`.

    `parameters` is the model's number of them, `pinned` says whether what is offloaded goes to page-locked memory, as
    suits a GPU. It has no optimizer and no schedule: those are ours. Clipping is told in each step anew.
    """
    low = {name: {"enabled": recipe.amp.precision == name} for name in ("bf16", "fp16")}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": recipe.train.max_grad_norm or 0.0,
        "communication_data_type": recipe.amp.reduce,
        # Sums over micro-batches are fp32 whatever the gradients are, and one that is not finite skips the step.
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {**low["bf16"], "check_grad_overflow": True},
        "fp16": low["fp16"],
        # Our AdamW, in host memory too: it is torch's fused kernel there, and DeepSpeed's would have to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(recipe, min(LARGEST_BUCKET, parameters + parameters % 2), pinned),
        "log_level": "error",
    }


def _zero(recipe: Recipe, bucket: int, pinned: bool) -> dict[str, Any]:
    section = recipe.sharding
    zero: dict[str, Any] = {"stage": section.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if section.zero_stage == 3:
        # It would exchange torch's linear function for the whole process.
        zero["memory_efficient_linear"] = False
        zero["stage3_prefetch_bucket_size"] = bucket
    if section.offload != "none":
        place: dict[str, Any] = {"device": "nvme" if section.offload == "nvme" else "cpu", "pin_memory": pinned}
        if section.offload == "nvme":
            place["nvme_path"] = section.nvme_path
        zero["offload_optimizer"] = place
        if section.offload != "optimizer":
            zero["offload_param"] = dict(place)
    return zero
