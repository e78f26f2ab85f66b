"""DeepSpeed's configuration as a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigtrain.errors import Fault, InputError
from bigtrain.translation.draft import PLACEHOLDER, Draft
from bigtrain.translation.source import Source
from bigtrain.translation.tables import DEEPSPEED

OPTIMIZERS = {
    "adam": ("adamw", "fp32"),
    "adamw": ("adamw", "fp32"),
    "lamb": ("lamb", "fp32"),
    "fusedlamb": ("lamb", "fp32"),
    "muon": ("muon", "fp32"),
    "adafactor": ("adafactor", "fp32"),
    "adam8bit": ("adamw", "8bit"),
    "adamw8bit": ("adamw", "8bit"),
}
"""Types in small letters, and what they are in a recipe: name and state."""

RATE, EPS, DECAY = 1e-3, 1e-8, 0.0
"""What DeepSpeed's optimizers take if nothing is written."""

SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
WARMUP_STEPS, COSINE_FLOOR = 1000, 1e-4
"""What DeepSpeed's schedules take if nothing is written."""

CLIPPING = 1.0
"""What DeepSpeed 0.19 clips to if nothing is written; old versions did not clip then."""

PRECISIONS = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "half": "fp16", "fp32": "fp32"}


def translate_deepspeed(
    values: Mapping[str, Any], where: str, *, world_size: int | None = None, preset: str | None = None
) -> Draft:
    """Return the recipe that a configuration amounts to on so many ranks; a file says how it is called in errors.

    Without `world_size` it is what the batch sizes say, or 1. Raises InputError for values that contradict each other
    or that no recipe can have.
    """
    source = Source.of(where, values)
    draft = Draft.started("Translated from a DeepSpeed configuration.", preset)
    _batch(source, draft, None if world_size is None else max(1, world_size // _sharing(source)))
    draft.put("amp.precision", "fp32", "neither bf16 nor fp16 is enabled")
    translate_precision(source, draft)
    if source.text("optimizer.type") is None:
        for key in ("optimizer.learning_rate", "optimizer.name"):
            draft.change(key, "the configuration has no optimizer, so the program makes it; write its values")
    translate_optimizer(source, draft)
    if source.text("scheduler.type") is None:
        draft.put("optimizer.schedule", "constant", "no scheduler, unless the program makes one")
    translate_scheduler(source, draft)
    if not source.has("gradient_clipping"):
        draft.put("train.max_grad_norm", CLIPPING, "no gradient_clipping: what DeepSpeed 0.19 takes")
        draft.change("gradient_clipping", "not written; old versions did not clip then: train.max_grad_norm=null")
    translate_engine(source, draft, world_size)
    _logging(source, draft)
    for key in source.autos:
        draft.change(key, f"auto is what the Trainer's arguments say; {AUTO_TOLD}")
    return finished(source, draft)


AUTO_TOLD = "what stands in the recipe is a default; `bigtrain recipes from-trainer` reads both"


def finished(source: Source, draft: Draft, table: Any = DEEPSPEED, quiet: tuple[str, ...] = ()) -> Draft:
    """Note what was not read; raise InputError for all that is wrong."""
    if source.faults:
        raise InputError(*source.faults)
    draft.leave_out(source, table, quiet)
    draft.check(source.where)
    return draft


def translate_engine(source: Source, draft: Draft, world_size: int | None) -> None:
    """Write down what is not of the Trainer's arguments: sharding, offload, clipping, reduction, recomputation."""
    norm = source.number("gradient_clipping")
    if norm is not None:
        draft.put("train.max_grad_norm", norm or None, "gradient_clipping")
    _zero(source, draft, world_size)
    for key in ("data_types.grad_accum_dtype", "communication_data_type"):
        if (name := source.text(key)) is not None and name != "none":
            _reduce(draft, key, name)
    if source.flag("activation_checkpointing.cpu_checkpointing"):
        draft.put("recompute.policy", "offload", "activation_checkpointing.cpu_checkpointing; needs CUDA")
    if (shared := _sharing(source)) > 1:
        draft.put("sharding.tensor_parallel", shared, "tensor_parallel.autotp_size")


def _sharing(source: Source) -> int:
    return max(1, source.whole("tensor_parallel.autotp_size") or 1)


def _batch(source: Source, draft: Draft, world_size: int | None) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, accumulation = (source.whole(name) for name in names)
    for name, value in zip(names, (total, micro, accumulation), strict=True):
        if value is not None and value < 1:
            source.faults.append(Fault(source.where, name, f"{value} is below 1; write 1 or more"))
            return
    share = (micro or 1) * (accumulation or 1)
    ranks = world_size or 1
    if total is None:
        total, origin = share * ranks, f"{micro or 1} a rank x {accumulation or 1} accumulated x {ranks} ranks"
        if world_size is None:
            draft.change("train_micro_batch_size_per_gpu", "rows of one rank; counted for 1, say --world-size N")
    else:
        origin = names[0]
        both = None not in (micro, accumulation)
        wrong = total % share != 0 if world_size is None else total % (share * ranks) != 0
        if wrong or (both and world_size is not None and total != share * ranks):
            text = f"{total} is not {micro or 'micro'} x {accumulation or 'accumulation'} x {world_size or 'ranks'}"
            fix = f"; with these it is {share * ranks}" if both and world_size else ""
            source.faults.append(Fault(source.where, names[0], f"{text}{fix}; make them agree"))
            return
    draft.put("train.global_batch_size", total, origin)
    if micro is not None:
        draft.put("train.micro_batch_size", micro, names[1])
    elif accumulation is not None and world_size is not None:
        origin = f"{names[0]} / ({names[2]} x {ranks} ranks)"
        draft.put("train.micro_batch_size", total // (accumulation * ranks), origin)


def translate_precision(source: Source, draft: Draft) -> None:
    """Write down the precision that is enabled, if one is."""
    enabled = [name for name in ("bf16", "bfloat16", "fp16") if source.flag(f"{name}.enabled")]
    if len({PRECISIONS[name] for name in enabled}) > 1:
        source.faults.append(Fault(source.where, "fp16.enabled", f"is true beside {enabled[0]}.enabled; keep one"))
    for name in enabled:
        draft.put("amp.precision", PRECISIONS[name], f"{name}.enabled")
    if source.flag("torch_autocast.enabled"):
        dtype = (source.text("torch_autocast.dtype") or "bfloat16").removeprefix("torch.")
        draft.put("amp.precision", PRECISIONS.get(dtype, "bf16"), "torch_autocast.dtype")


def translate_optimizer(source: Source, draft: Draft) -> None:
    """Write down the optimizer, if there is one; a value that is `auto` stays as the draft has it."""
    kind = source.text("optimizer.type")
    if kind is None:
        return
    name, state = OPTIMIZERS.get(kind.lower(), ("adamw", "fp32"))
    draft.put("optimizer.name", name, f"optimizer.type {kind}")
    if kind.lower() not in OPTIMIZERS:
        draft.lack("optimizer.type", f"{kind}; adamw stands in its place, so tune its learning rate anew")
    if state != "fp32":
        draft.put("optimizer.state", state, f"optimizer.type {kind}")
    coupled = "optimizer.params.adam_w_mode"
    if source.has(coupled) and not source.flag(coupled) and source.number("optimizer.params.weight_decay"):
        draft.change(coupled, "false adds the decay to the gradient (L2); adamw decouples it")
    for param, key, default in (
        ("lr", "optimizer.learning_rate", RATE),
        ("eps", "optimizer.eps", EPS),
        ("weight_decay", "optimizer.weight_decay", DECAY),
    ):
        theirs = f"optimizer.params.{param}"
        value = source.number(theirs)
        if value is not None:
            draft.put(key, value, theirs)
        elif theirs not in source.autos:
            draft.put(key, default, f"no {theirs}: DeepSpeed's default")
    if source.number("optimizer.params.weight_decay"):
        draft.change("optimizer.params.weight_decay", "here biases and normalization weights have none")
    if (betas := source.get("optimizer.params.betas")) is not None:
        draft.put("optimizer.betas", betas, "optimizer.params.betas")


def translate_scheduler(source: Source, draft: Draft) -> None:
    """Write down the scheduler, if there is one; a value that is `auto` stays as the draft has it."""
    kind = source.text("scheduler.type")
    if kind is None:
        return
    draft.put("optimizer.schedule", SCHEDULES.get(kind, "constant"), f"scheduler.type {kind}")
    if kind not in SCHEDULES:
        draft.lack("scheduler.type", f"{kind}; a constant rate stands in its place")
        return
    prefix = "scheduler.params."
    peak = source.number(f"{prefix}warmup_max_lr")
    if kind != "WarmupCosineLR" and f"{prefix}warmup_max_lr" not in source.autos:
        origin = f"{prefix}warmup_max_lr" if peak is not None else f"no {prefix}warmup_max_lr: DeepSpeed's default"
        rate = RATE if peak is None else peak
        if source.number("optimizer.params.lr") not in (None, rate):
            draft.change("optimizer.params.lr", f"the scheduler sets another peak, {rate:g}, which counts")
        draft.put("optimizer.learning_rate", rate, origin)
    _lengths(source, draft, prefix)
    if source.text(f"{prefix}warmup_type") != "linear":
        draft.change(f"{prefix}warmup_type", "theirs rises by the logarithm of the step (log); here it is linear")
    floor = source.number(f"{prefix}cos_min_ratio")
    if kind == "WarmupCosineLR" and floor != 0.1:
        shown = COSINE_FLOOR if floor is None else floor
        draft.change(f"{prefix}cos_min_ratio", f"theirs ends at {shown:g} of the peak; cosine here at a tenth")


def _lengths(source: Source, draft: Draft, prefix: str) -> None:
    """Write down the steps of warm-up and of the run."""
    warmup, total = source.whole(f"{prefix}warmup_num_steps"), source.whole(f"{prefix}total_num_steps")
    if f"{prefix}warmup_num_steps" not in source.autos:
        origin = f"{prefix}warmup_num_steps" if warmup is not None else f"no {prefix}warmup_num_steps: theirs"
        warmup = WARMUP_STEPS if warmup is None else warmup
        draft.put("optimizer.warmup_steps", warmup, origin)
    if total is not None:
        draft.put("train.steps", total, f"{prefix}total_num_steps")
    elif warmup and draft.is_placeholder("train.steps"):
        draft.put("train.steps", 10 * warmup, PLACEHOLDER)


def _zero(source: Source, draft: Draft, world_size: int | None) -> None:
    stage = source.whole("zero_optimization.stage")
    if stage is not None or "zero_optimization.stage" not in source.autos:
        draft.put("sharding.zero_stage", stage or 0, "zero_optimization.stage" if stage is not None else "no stage: 0")
    prefix = "zero_optimization.offload_"
    states, weights = (source.text(f"{prefix}{part}.device") for part in ("optimizer", "param"))
    if source.flag("zero_optimization.cpu_offload"):
        states = "cpu"
    for key in ("cpu_offload_param", "cpu_offload_params"):
        if source.flag(f"zero_optimization.{key}"):
            weights = "cpu"
    _offload(source, draft, states, weights)
    size = source.whole("zero_optimization.mics_shard_size")
    if size is not None and size > 0:
        if world_size is not None and world_size % size == 0:
            origin = f"{world_size} ranks / zero_optimization.mics_shard_size"
            draft.put("sharding.replicate", world_size // size, origin)
        else:
            told = f"sharding.replicate is ranks / {size}; say --world-size N"
            draft.change("zero_optimization.mics_shard_size", told)


def _offload(source: Source, draft: Draft, states: str | None, weights: str | None) -> None:
    prefix = "zero_optimization.offload_"
    paths = [source.text(f"{prefix}{part}.nvme_path") for part in ("optimizer", "param")]
    if "nvme" in (states, weights):
        draft.put("sharding.engine", "deepspeed", "NVMe is DeepSpeed's")
        draft.put("sharding.offload", "nvme", f"{prefix}{'optimizer' if states == 'nvme' else 'param'}.device")
        draft.put("sharding.nvme_path", next(filter(None, paths), "/local_nvme"), f"{prefix}*.nvme_path")
        if (states, weights) != ("nvme", "nvme"):
            draft.change(f"{prefix}*.device", "nvme takes states and weights both, at stage 3")
    elif weights == "cpu":
        draft.put("sharding.offload", "all", f"{prefix}param.device")
        if states != "cpu":
            draft.change(f"{prefix}param.device", "all takes the optimizer states to the host, too")
    elif states == "cpu":
        draft.put("sharding.offload", "optimizer", f"{prefix}optimizer.device")
    elif not {f"{prefix}{part}.device" for part in ("optimizer", "param")} & set(source.autos):
        draft.put("sharding.offload", "none", "no zero_optimization.offload_*")


def _reduce(draft: Draft, key: str, name: str) -> None:
    if (found := PRECISIONS.get(name)) in ("fp32", "bf16"):
        draft.put("amp.reduce", found, key)
    else:
        draft.lack(key, f"{name}; gradients are summed in fp32 or bf16 (amp.reduce)")


def _logging(source: Source, draft: Draft) -> None:
    every = source.whole("steps_per_print")
    if every is not None and every > 0:
        draft.put("logging.every_steps", every, "steps_per_print")
    trackers = [name for name in ("tensorboard", "wandb", "comet") if source.flag(f"{name}.enabled")]
    if trackers:
        draft.put("logging.trackers", trackers, ", ".join(f"{name}.enabled" for name in trackers))
