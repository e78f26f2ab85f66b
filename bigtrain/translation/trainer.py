"""The arguments of transformers' Trainer as a recipe: those of a command line, or what `to_json_string` writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bigtrain.config.keys import choices
from bigtrain.errors import Fault
from bigtrain.translation.deepspeed import (
    finished,
    translate_engine,
    translate_optimizer,
    translate_precision,
    translate_scheduler,
)
from bigtrain.translation.draft import Draft
from bigtrain.translation.source import AUTO, Source
from bigtrain.translation.tables import DEEPSPEED, QUIET, TRAINER

ADAMW = [
    "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla", "adamw_torch_npu_fused",
    "adamw_anyprecision", "paged_adamw", "paged_adamw_32bit",
]  # fmt: skip
OPTIMIZERS = {
    **dict.fromkeys(ADAMW, ("adamw", "fp32")),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), ("adamw", "8bit")),
    "adamw_torch_4bit": ("adamw", "4bit"),
    "adafactor": ("adafactor", "fp32"),
}
"""`optim`, and what it is in a recipe: name and state."""

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "polynomial": "linear",
}
SCHEDULE_CHANGES = {
    "cosine": "cosine here ends at a tenth of the peak, theirs at 0",
    "cosine_with_min_lr": "cosine here ends at a tenth of the peak",
    "cosine_warmup_with_min_lr": "cosine here ends at a tenth of the peak",
    "warmup_stable_decay": "wsd falls linearly over the last fifth",
    "polynomial": "linear is a polynomial of power 1; here it ends at 0",
}

FLOOR_KEY, FLOOR = "lr_scheduler_kwargs.min_lr_rate", 0.1
"""What the rate ends at, of the peak, and what it ends at here."""

SHARDED = {
    "full_shard": 3,
    "shard_grad_op": 2,
    "no_shard": 0,
    "hybrid_shard": 3,
    "hybrid_shard_zero2": 2,
    "true": 3,
}
"""Words of `fsdp`, and the ZeRO stage."""

TRACKERS = {"comet_ml": "comet"}
ROWS, EPOCHS, TIMEOUT = 8, 3.0, 1800
"""What the Trainer takes if nothing is written: rows a device, passes over the data, seconds."""

LIMIT = 2
"""The least `checkpoint.keep`."""


def translate_trainer(
    values: Mapping[str, Any], where: str, *, world_size: int | None = None, preset: str | None = None
) -> Draft:
    """Return the recipe that the Trainer's arguments amount to on so many ranks, 1 without `world_size`.

    `where` is how the file is called in errors. Raises InputError for values that no recipe can have.
    """
    inside = values.get("deepspeed")
    source = Source.of(where, {key: value for key, value in values.items() if key != "deepspeed"})
    draft = Draft.started("Translated from arguments of transformers' Trainer.", preset)
    _batch(source, draft, world_size)
    for translate in (_name, _length, _optimizer, _schedule, _precision, _mechanisms, _intervals, _trackers, _fsdp):
        translate(source, draft)
    if isinstance(inside, dict):
        _deepspeed(inside, draft, source, world_size)
    elif inside:
        draft.change("deepspeed", f"{inside}: a file of its own; give it to `bigtrain recipes from-deepspeed`")
    return finished(source, draft, TRAINER, tuple(QUIET))


def _name(source: Source, draft: Draft) -> None:
    told, folder = source.text("run_name"), source.text("output_dir")
    for key, text in (("run_name", told), ("output_dir", folder)):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", (text or "").rstrip("/").rpartition("/")[2]).strip("-._")
        if name:
            draft.put("name", name, key)
            break
    if (seed := source.whole("seed")) is not None:
        draft.put("seed", seed, "seed")
    if source.flag("use_cpu") or source.flag("no_cuda"):
        draft.put("train.device", "cpu", "use_cpu")


def _batch(source: Source, draft: Draft, world_size: int | None) -> None:
    micro, accumulation = source.whole("per_device_train_batch_size"), source.whole("gradient_accumulation_steps")
    for key, value in (("per_device_train_batch_size", micro), ("gradient_accumulation_steps", accumulation)):
        if value is not None and value < 1:
            source.faults.append(Fault(source.where, key, f"{value} is below 1; write 1 or more"))
            return
    rows, times, ranks = micro or ROWS, accumulation or 1, world_size or 1
    total = rows * times * ranks
    draft.put("train.global_batch_size", total, f"{rows} a device x {times} accumulated x {ranks} ranks")
    if world_size is None:
        draft.change("per_device_train_batch_size", "rows of one rank; counted for 1, say --world-size N")
    if source.flag("auto_find_batch_size"):
        draft.put("train.micro_batch_size", "auto", "auto_find_batch_size")
    else:
        draft.put("train.micro_batch_size", rows, "per_device_train_batch_size" if micro else "no batch size: theirs")
    if source.has("average_tokens_across_devices") and not source.flag("average_tokens_across_devices"):
        draft.change("average_tokens_across_devices", "here each label of the global batch counts alike")


def _length(source: Source, draft: Draft) -> None:
    steps, epochs = source.whole("max_steps"), source.number("num_train_epochs")
    if steps is not None and steps > 0:
        draft.put("train.steps", steps, "max_steps")
    else:
        origin = "num_train_epochs" if epochs is not None else "no num_train_epochs: theirs"
        draft.put("train.epochs", EPOCHS if epochs is None else epochs, origin)


def _optimizer(source: Source, draft: Draft) -> None:
    kind = source.text("optim") or ("adafactor" if source.flag("adafactor") else "adamw_torch")
    name, state = OPTIMIZERS.get(kind, ("adamw", "fp32"))
    draft.put("optimizer.name", name, f"optim {kind}")
    if kind not in OPTIMIZERS:
        draft.lack("optim", f"{kind}; adamw stands in its place, so tune its learning rate anew")
    if state != "fp32":
        draft.put("optimizer.state", state, f"optim {kind}")
    if kind.startswith("paged"):
        draft.change("optim", "paged states move to the host by need; here sharding.offload=optimizer says so")
    for key, ours, default in (
        ("learning_rate", "optimizer.learning_rate", 5e-5),
        ("weight_decay", "optimizer.weight_decay", 0.0),
        ("adam_epsilon", "optimizer.eps", 1e-8),
    ):
        value = source.number(key)
        draft.put(ours, default if value is None else value, key if value is not None else f"no {key}: theirs")
    first, second = source.number("adam_beta1"), source.number("adam_beta2")
    if first is not None or second is not None:
        betas = [0.9 if first is None else first, 0.999 if second is None else second]
        draft.put("optimizer.betas", betas, "adam_beta1, adam_beta2")
    norm = source.number("max_grad_norm")
    if norm is not None:
        draft.put("train.max_grad_norm", norm or None, "max_grad_norm")
    if smoothing := source.number("label_smoothing_factor"):
        draft.put("train.label_smoothing", smoothing, "label_smoothing_factor")


def _schedule(source: Source, draft: Draft) -> None:
    kind = source.text("lr_scheduler_type") or "linear"
    draft.put("optimizer.schedule", SCHEDULES.get(kind, "linear"), f"lr_scheduler_type {kind}")
    is_same = "min_lr" in kind and source.values.get(FLOOR_KEY) == FLOOR
    if is_same:
        source.read.add(FLOOR_KEY)
    elif kind in SCHEDULE_CHANGES:
        draft.change("lr_scheduler_type", SCHEDULE_CHANGES[kind])
    if kind not in SCHEDULES:
        draft.lack("lr_scheduler_type", f"{kind}; linear stands in its place")
    steps, ratio = source.number("warmup_steps") or 0, source.number("warmup_ratio") or 0
    key, share = ("warmup_steps", steps) if steps > 0 else ("warmup_ratio", ratio)
    if share > 0 and kind == "constant":
        draft.change(key, "the schedule constant has no warm-up there; a recipe's may: optimizer.warmup_steps")
    elif share > 0:
        draft.put("optimizer.warmup_steps", f"{share * 100:.6g}%" if share < 1 else round(share), key)


def _precision(source: Source, draft: Draft) -> None:
    wanted = [name for name in ("bf16", "fp16") if source.flag(name)]
    if len(wanted) > 1:
        source.faults.append(Fault(source.where, "fp16", "is true beside bf16; keep one"))
    draft.put("amp.precision", (wanted or ["fp32"])[0], (wanted or ["neither bf16 nor fp16"])[0])


def _mechanisms(source: Source, draft: Draft) -> None:
    for key in ("gradient_checkpointing", "activation_checkpointing"):
        if source.flag(key):
            draft.put("recompute.policy", "full", f"{key}; auto recomputes only what must be")
    if source.flag("torch_compile"):
        draft.put("train.compile", True, "torch_compile")
    seconds = source.number("ddp_timeout")
    if seconds not in (None, TIMEOUT):
        draft.put("cluster.timeout", f"{seconds:g}s", "ddp_timeout")


def _intervals(source: Source, draft: Draft) -> None:
    logged = _interval(source, draft, "logging_strategy", "logging_steps", 500)
    if logged is not None:
        draft.put("logging.every_steps", logged, "logging_steps")
    source.read |= {"do_eval", "eval_steps", "save_steps", "logging_steps"}
    named = "eval_strategy" if source.has("eval_strategy") else "evaluation_strategy"
    if source.text(named) in (None, "no"):
        draft.put("train.eval_every", None, "no eval_strategy")
    elif (every := _interval(source, draft, named, "eval_steps", logged)) is not None:
        draft.put("train.eval_every", every, "eval_steps" if source.has("eval_steps") else "logging_steps")
    if source.text("save_strategy") == "no":
        draft.put("checkpoint.every_steps", None, "save_strategy no; the end of a run is always saved")
    elif (every := _interval(source, draft, "save_strategy", "save_steps", 500)) is not None:
        origin = "save_steps" if source.has("save_steps") else "no save_steps: theirs"
        draft.put("checkpoint.every_steps", every, origin)
    kept = source.whole("save_total_limit")
    if kept is None:
        draft.change("save_total_limit", "not written, which keeps all; here the newest 3 (checkpoint.keep)")
    else:
        origin = "save_total_limit" if kept >= LIMIT else "save_total_limit; at least 2"
        draft.put("checkpoint.keep", max(kept, LIMIT), origin)


def _interval(source: Source, draft: Draft, strategy: str, steps: str, default: int | None) -> int | None:
    """Return how many steps an interval has, or None, which is noted, where it is not in steps."""
    kind, every = source.text(strategy) or "steps", source.number(steps)
    if kind == "steps" and (every is None or every >= 1):
        return default if every is None else round(every)
    if kind == "steps":
        draft.lack(steps, f"{every:g}, a share of the run; write steps")
    elif kind != "no":
        draft.lack(strategy, f"{kind}; intervals are in steps")
    return None


def _trackers(source: Source, draft: Draft) -> None:
    known = choices("logging.trackers")
    found = [TRACKERS.get(name, name) for name in source.texts("report_to") or [] if name != "none"]
    for name in found:
        if name not in known:
            draft.lack("report_to", f"{name}; trackers are {', '.join(map(str, known))}")
    draft.put("logging.trackers", [name for name in found if name in known], "report_to")


def _fsdp(source: Source, draft: Draft) -> None:
    if isinstance(told := source.get("fsdp"), bool):
        words = ["true"] if told else []
    else:
        words = ",".join(source.texts("fsdp") or []).lower().replace(",", " ").split()
    stages = [SHARDED[word] for word in words if word in SHARDED]
    settings = [key for key in source.values if key.startswith("fsdp_config.")]
    if not stages:  # its settings say nothing then
        source.read.update(settings)
        return
    reshard = source.get("fsdp_config.reshard_after_forward")
    origin, stage = f"fsdp {' '.join(words)}", stages[0]
    if reshard is not None and "true" in words:
        stage = 2 if str(reshard).lower() in ("false", "shard_grad_op") else 3
        origin = "fsdp_config.reshard_after_forward"
    draft.put("sharding.zero_stage", stage, origin)
    if any(word.startswith("hybrid") for word in words):
        draft.change("fsdp", "hybrid shards inside a node; sharding.replicate is the number of nodes")
    if "offload" in words or str(source.get("fsdp_config.cpu_offload")).lower() == "true":
        draft.put("sharding.offload", "all", "fsdp offload")
    if str(source.get("fsdp_config.activation_checkpointing")).lower() == "true":
        draft.put("recompute.policy", "full", "fsdp_config.activation_checkpointing")


def _deepspeed(values: Mapping[str, Any], draft: Draft, outer: Source, world_size: int | None) -> None:
    """Write down what DeepSpeed is told; the batch, and what is `auto`, is the Trainer's."""
    source = Source.of(outer.where, values)
    translate_precision(source, draft)
    translate_optimizer(source, draft)
    translate_scheduler(source, draft)
    translate_engine(source, draft, world_size)
    source.read |= {key for key, value in source.values.items() if value == AUTO}
    source.read |= {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    source.read |= {"steps_per_print"}
    outer.faults += source.faults
    draft.leave_out(source, DEEPSPEED)
