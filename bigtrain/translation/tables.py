"""Key by key: what DeepSpeed, transformers' Trainer and nanoGPT call a thing, and what it is in a recipe.

The translations and the tables of the documentation read the same rows. Facts are of DeepSpeed 0.19, transformers 5
(and 4, where a key went), and nanoGPT's train.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Row:
    """Keys of theirs, keys of a recipe, and what to know of the difference.

    `theirs` and `ours` are dotted keys, several with spaces between; a name before `.*` is a whole section. Without
    `ours` there is no counterpart. `idle` are values with which such a key asks for nothing, beside null, false and
    empty ones.
    """

    theirs: str
    ours: str
    note: str = ""
    idle: tuple[object, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Return their keys one by one."""
        return tuple(self.theirs.split())


_ENGINE = "how the engine sends and stores; chosen by the engine, and the mathematics is the same"
_SCALE = "the loss scale of fp16 is dynamic: from 65536, doubled after 2000 good steps"
_SEEN = "`bigtrain profile` and `report.html` show it"
_DATA = "another data pipeline; tokenized shards are memory-mapped and read ahead"

DEEPSPEED: tuple[Row, ...] = (
    Row("train_batch_size", "train.global_batch_size", "micro-batch x accumulation x ranks"),
    Row("train_micro_batch_size_per_gpu", "train.micro_batch_size", "`auto` takes the fastest that fits"),
    Row("gradient_accumulation_steps", "train.global_batch_size", "derived: global / (micro x ranks)"),
    Row("optimizer.type", "optimizer.name optimizer.state", "Adam and AdamW: `adamw`; Lamb: `lamb`; Muon: `muon`"),
    Row("optimizer.params.lr", "optimizer.learning_rate", "the peak"),
    Row("optimizer.params.betas", "optimizer.betas"),
    Row("optimizer.params.eps", "optimizer.eps", "1e-8 if not written, where a recipe has 1e-6"),
    Row("optimizer.params.weight_decay", "optimizer.weight_decay", "here not on biases and normalization weights"),
    Row("optimizer.params.adam_w_mode", "optimizer.name", "false adds decay to the gradient; `adamw` decouples it"),
    Row("optimizer.params.bias_correction", "", "moments are always corrected", (True,)),
    Row("optimizer.params.torch_adam optimizer.params.fused optimizer.params.set_grad_none optimizer.legacy_fusion",
        "", "the fastest kernel that is here is taken", (True,)),
    Row("optimizer.params.*", "", "a setting of that optimizer alone"),
    Row("scheduler.type", "optimizer.schedule",
        "WarmupLR: `constant`; WarmupDecayLR: `linear`; WarmupCosineLR: `cosine`, to a tenth"),
    Row("scheduler.params.warmup_max_lr", "optimizer.learning_rate", "of WarmupLR and WarmupDecayLR the peak"),
    Row("scheduler.params.warmup_num_steps", "optimizer.warmup_steps", "1000 if not written; or a share such as 6%"),
    Row("scheduler.params.warmup_type", "optimizer.warmup_steps", "here linear; theirs is `log` if not written"),
    Row("scheduler.params.total_num_steps", "train.steps", "or `train.tokens`, `train.epochs`"),
    Row("scheduler.params.warmup_min_lr scheduler.params.warmup_min_ratio", "", "the warm-up starts near 0", (0, 0.0)),
    Row("scheduler.params.cos_min_ratio", "optimizer.schedule", "`cosine` ends at a tenth of the peak"),
    Row("scheduler.params.*", "", "a setting of that schedule alone"),
    Row("bf16.enabled", "amp.precision", "true: `bf16`"),
    Row("fp16.enabled", "amp.precision", "true: `fp16`"),
    Row("torch_autocast.enabled torch_autocast.dtype", "amp.precision", "the dtype: `bf16` or `fp16`"),
    Row("fp16.loss_scale fp16.initial_scale_power fp16.loss_scale_window fp16.hysteresis fp16.min_loss_scale "
        "fp16.consecutive_hysteresis", "", _SCALE, (0, 0.0, 16)),
    Row("fp16.* bf16.* torch_autocast.*", "", "the engine keeps fp32 weights; see `amp.master_weights`"),
    Row("communication_data_type data_types.grad_accum_dtype", "amp.reduce", "fp32 or bf16"),
    Row("gradient_clipping", "train.max_grad_norm", "0 is `null`; not written 1.0 in 0.19, none in old versions"),
    Row("zero_optimization.stage", "sharding.zero_stage", "`auto` takes the fastest that fits"),
    Row("zero_optimization.offload_optimizer.device", "sharding.offload", "cpu: `optimizer`; nvme: `nvme`"),
    Row("zero_optimization.offload_param.device", "sharding.offload", "cpu: `all`, states too; nvme: `nvme`"),
    Row("zero_optimization.offload_optimizer.nvme_path zero_optimization.offload_param.nvme_path",
        "sharding.nvme_path sharding.engine", "NVMe is DeepSpeed's: `engine: deepspeed`"),
    Row("zero_optimization.cpu_offload zero_optimization.cpu_offload_params zero_optimization.cpu_offload_param",
        "sharding.offload", "the old spelling; true: `optimizer`, or `all` with parameters"),
    Row("zero_optimization.mics_shard_size", "sharding.replicate", "replicas are ranks / shard size"),
    Row("zero_optimization.zero_quantized_weights zero_optimization.zero_quantized_gradients "
        "zero_optimization.zero_quantized_nontrainable_weights zero_optimization.zero_hpz_partition_size",
        "", "ZeRO++; `sharding.replicate` keeps traffic inside a node without rounding", (1,)),
    Row("zero_optimization.stage3_gather_16bit_weights_on_model_save "
        "zero_optimization.stage3_gather_fp16_weights_on_model_save", "", "`bigtrain export` writes whole weights"),
    Row("zero_optimization.*", "", _ENGINE),
    Row("activation_checkpointing.cpu_checkpointing", "recompute.policy", "true: `offload`"),
    Row("activation_checkpointing.*", "", "`recompute.policy: auto` recomputes what must be, and no more"),
    Row("steps_per_print", "logging.every_steps"),
    Row("tensorboard.enabled wandb.enabled comet.enabled", "logging.trackers"),
    Row("csv_monitor.*", "", "`metrics.jsonl` is always written"),
    Row("tensorboard.* wandb.* comet.*", "", "metrics go to the run folder, under the run's name"),
    Row("tensor_parallel.autotp_size", "sharding.tensor_parallel", "of training; inside a node"),
    Row("prescale_gradients gradient_predivide_factor sparse_gradients disable_allgather "
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer use_node_local_storage "
        "communication_data_type_seq seq_parallel_communication_data_type disable_python_gc", "", _ENGINE, (1, 1.0)),
    Row("wall_clock_breakdown memory_breakdown dump_state flops_profiler.* comms_logger.*", "", _SEEN),
    Row("autotuning.*", "", "`bigtrain plan` chooses without trial runs"),
    Row("elasticity.*", "", "`cluster.nodes: least:most` keeps the global batch whatever the nodes"),
    Row("compile.*", "", "`train.compile`, by block, for any stage"),
    Row("checkpoint.* nebula.* datastates.*", "", "checkpoints resume on any number of ranks, written in background"),
    Row("aio.*", "", "DeepSpeed's own values are used for NVMe"),
    Row("data_efficiency.* curriculum_learning.* data_types.* dataloader_drop_last", "", _DATA),
    Row("amp.*", "", "Apex's; `amp.precision` takes its place"),
    Row("progressive_layer_drop.* eigenvalue.* quantize_training.* compression_training.* sparse_attention.* "
        "weight_quantization.* pipeline.* hybrid_engine.* inference.* sequence_parallel_size",
        "", "not in bigtrain", (1,)),
    Row("vocabulary_size log_level managed_gradient_accumulation gradient_allreduce_op zenflow.* zenflow", "", _ENGINE,
        ("mean", True)),
)  # fmt: skip

TRAINER: tuple[Row, ...] = (
    Row("per_device_train_batch_size", "train.micro_batch_size", "`auto` takes the fastest that fits"),
    Row("gradient_accumulation_steps", "train.global_batch_size", "per device x accumulation x ranks"),
    Row("auto_find_batch_size", "train.micro_batch_size", "true: `auto`, found by planning"),
    Row("max_steps", "train.steps", "-1: `num_train_epochs` counts"),
    Row("num_train_epochs", "train.epochs"),
    Row("learning_rate", "optimizer.learning_rate", "the peak; 5e-5 if not written"),
    Row("lr_scheduler_type", "optimizer.schedule", "warmup_stable_decay: `wsd`; `cosine` ends at a tenth, theirs at 0"),
    Row("lr_scheduler_kwargs.min_lr_rate", "optimizer.schedule", "0.1 is how `cosine` ends"),
    Row("lr_scheduler_kwargs lr_scheduler_kwargs.*", "",
        "schedules have one form: `wsd` falls linearly over the last fifth of the run, `cosine` to a tenth", ("{}",)),
    Row("warmup_steps", "optimizer.warmup_steps", "below 1 a share of the run, here `6%`"),
    Row("warmup_ratio", "optimizer.warmup_steps", "transformers 4; a share of the run"),
    Row("optim", "optimizer.name optimizer.state", "adamw_8bit, adamw_bnb_8bit: `state: 8bit`; adamw_torch_4bit: 4bit"),
    Row("weight_decay", "optimizer.weight_decay", "on neither side on biases and normalization weights"),
    Row("adam_beta1 adam_beta2", "optimizer.betas"),
    Row("adam_epsilon", "optimizer.eps", "1e-8 if not written, where a recipe has 1e-6"),
    Row("adafactor", "optimizer.name", "transformers 4; true: `adafactor`"),
    Row("max_grad_norm", "train.max_grad_norm", "0 is `null`"),
    Row("label_smoothing_factor", "train.label_smoothing"),
    Row("average_tokens_across_devices", "train.global_batch_size", "each label counts alike, always"),
    Row("bf16 fp16", "amp.precision"),
    Row("gradient_checkpointing activation_checkpointing", "recompute.policy", "true: `full`; `auto` does less"),
    Row("torch_compile", "train.compile", "here by block; `auto` compiles on CUDA"),
    Row("logging_steps logging_strategy", "logging.every_steps"),
    Row("report_to", "logging.trackers", "comet_ml: `comet`; `metrics.jsonl` is always written"),
    Row("eval_strategy eval_steps evaluation_strategy do_eval", "train.eval_every",
        "in steps, and always at the end; without eval_steps logging_steps count"),
    Row("save_strategy save_steps", "checkpoint.every_steps", "in steps, and always at the end"),
    Row("save_total_limit", "checkpoint.keep", "at least 2"),
    Row("seed", "seed", "other random numbers all the same"),
    Row("run_name output_dir", "name", "the run folder is `runs/NAME`, or `--run-dir`"),
    Row("use_cpu no_cuda", "train.device", "true: `cpu`"),
    Row("ddp_timeout", "cluster.timeout", "how long a rank waits for the others, 60s if not written"),
    Row("fsdp", "sharding.zero_stage sharding.offload", "full_shard: 3; shard_grad_op: 2; no_shard: 0; offload: `all`"),
    Row("fsdp_config.reshard_after_forward", "sharding.zero_stage", "true: 3; false: 2"),
    Row("fsdp_config.cpu_offload", "sharding.offload", "true: `all`"),
    Row("fsdp_config.activation_checkpointing", "recompute.policy", "true: `full`"),
    Row("fsdp_config.*", "", "blocks are wrapped one by one; weights are whole in an export", (True, 2, 0)),
    Row("deepspeed", "sharding.*", "a mapping is translated too; `auto` in it is what the arguments say"),
    Row("resume_from_checkpoint overwrite_output_dir", "", "the same `bigtrain launch` again resumes"),
    Row("optim_args optim_target_modules", "", "a setting of that optimizer alone"),
    Row("data_seed", "", "one `seed` for weights, order and masks"),
    Row("neftune_noise_alpha", "", "noise in embeddings, of fine-tuning"),
    Row("use_liger_kernel liger_kernel_config", "", "logits are computed in chunks, always"),
    Row("tf32", "", "fp32 products use tf32 nowhere"),
    Row("torch_compile_backend torch_compile_mode", "", "inductor, by block", ("inductor",)),
    Row("load_best_model_at_end metric_for_best_model greater_is_better eval_on_start eval_delay",
        "", "evaluations are logged; `bigtrain eval` takes any checkpoint", (0,)),
    Row("push_to_hub hub_model_id hub_private_repo hub_revision push_to_hub_model_id", "",
        "`bigtrain export` writes a folder to push"),
    Row("group_by_length train_sampling_strategy", "", "rows are packed (`data.packing`): no padding", ("random",)),
    Row("full_determinism", "", "runs repeat bit by bit on the same ranks"),
    Row("parallelism_config", "", "`sharding.replicate` and `sharding.tensor_parallel`"),
    Row("ignore_data_skip", "", "resuming goes on at the very row; nothing is skipped by reading it"),
    Row("save_only_model", "", "checkpoints hold what resuming needs"),
    Row("dataloader_num_workers dataloader_prefetch_factor dataloader_persistent_workers dataloader_drop_last "
        "dataloader_multiprocessing_context", "", _DATA, (0,)),
    Row("torch_empty_cache_steps", "", "the plan keeps within the budget"),
    Row("per_gpu_train_batch_size fp16_opt_level fp16_backend half_precision_backend sharded_ddp torchdynamo tpu_* "
        "use_ipex jit_mode_eval use_mps_device mp_parameters xpu_backend", "", "gone from transformers",
        ("O1", "auto", "")),
)  # fmt: skip

QUIET = [
    "accelerator_config", "dataloader_pin_memory", "dataloader_in_order", "ddp_*", "debug", "disable_tqdm",
    "do_train", "do_predict", "enable_jit_checkpoint", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval",
    "eval_*", "generation_*", "hub_*", "include_*", "label_names", "length_column_name", "local_rank", "log_*",
    "logging_first_step", "logging_dir", "logging_nan_inf_filter", "past_index", "per_device_eval_batch_size",
    "per_gpu_eval_batch_size", "predict_with_generate", "prediction_loss_only", "project",
    "push_to_hub_organization", "push_to_hub_token", "ray_scope", "remove_unused_columns",
    "restore_callback_states_from_checkpoint", "save_on_each_node", "save_safetensors", "skip_memory_metrics",
    "sortish_sampler", "trackio_*", "use_cache", "_n_gpu", "distributed_state", "deepspeed_plugin",
    "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "fsdp_min_num_params",
    "fsdp_transformer_layer_cls_to_wrap", "use_legacy_prediction_loop", "split_batches", "dispatch_batches",
]  # fmt: skip
"""Keys of the Trainer that say nothing about training itself: how it logs, evaluates and uploads."""

NANOGPT: tuple[Row, ...] = (
    Row("n_layer", "model.num_hidden_layers", "or a preset: `preset: gpt2-124m`"),
    Row("n_head", "model.num_attention_heads"),
    Row("n_embd", "model.hidden_size"),
    Row("block_size", "data.sequence_length"),
    Row("vocab_size", "model.vocab_size", "`auto` is the tokenizer's; 50304 is allowed for 50257"),
    Row("dropout", "train.dropout", "`train.attention_dropout` is a key of its own"),
    Row("bias", "", "GPT-2's biases, always"),
    Row("dataset", "data.source", "texts: a hub id, files or a folder; no prepare.py"),
    Row("batch_size", "train.micro_batch_size", "`auto` takes the fastest that fits"),
    Row("gradient_accumulation_steps", "train.global_batch_size", "batch_size x accumulation, which counts all ranks"),
    Row("max_iters", "train.steps", "or `train.tokens`, `train.epochs`"),
    Row("learning_rate", "optimizer.learning_rate"),
    Row("weight_decay", "optimizer.weight_decay", "embeddings are decayed on both sides"),
    Row("beta1 beta2", "optimizer.betas", "eps is 1e-8 there, 1e-6 here if not written"),
    Row("grad_clip", "train.max_grad_norm", "0.0 is `null`"),
    Row("decay_lr", "optimizer.schedule", "true: `cosine`; false: `constant`"),
    Row("warmup_iters", "optimizer.warmup_steps", "or a share such as 6%"),
    Row("lr_decay_iters", "train.steps", "the schedule is as long as the run"),
    Row("min_lr", "optimizer.schedule", "`cosine` ends at a tenth of the peak, as its rule of thumb"),
    Row("init_from", "train.init_from", "`resume` is the same command again; gpt2: `bigtrain import` first"),
    Row("eval_interval", "train.eval_every"),
    Row("eval_iters", "train.eval_rows", "rows, not batches"),
    Row("eval_only", "", "`bigtrain eval RUN`"),
    Row("log_interval", "logging.every_steps"),
    Row("wandb_log", "logging.trackers", "`[tensorboard, wandb]`"),
    Row("wandb_project wandb_run_name", "name"),
    Row("always_save_checkpoint", "checkpoint.every_steps checkpoint.keep"),
    Row("out_dir", "name", "`runs/NAME`, or `--run-dir`"),
    Row("device", "train.device"),
    Row("dtype", "amp.precision", "bfloat16: `bf16`; float16: `fp16`; float32: `fp32`"),
    Row("compile", "train.compile", "here by block"),
    Row("backend", "", "nccl on CUDA, gloo on the CPU"),
)


@cache
def rows_by_key(table: tuple[Row, ...]) -> Mapping[str, Row]:
    """Return the rows of a table by each of their keys."""
    return {key: row for row in table for key in row.keys}


def row_of(table: tuple[Row, ...], key: str) -> Row | None:
    """Return the row of a dotted key, or of the nearest section around it, or None."""
    rows = rows_by_key(table)
    if key in rows:
        return rows[key]
    while key:
        if f"{key}.*" in rows:
            return rows[f"{key}.*"]
        key = key.rpartition(".")[0]
    return None


def asks_for_something(row: Row, value: object) -> bool:
    """Tell whether a value of a key without counterpart would change anything."""
    idle = (None, False, "none", "no", "", [], {}, *row.idle)
    return not any(value == nothing and type(value) is type(nothing) for nothing in idle)


def markdown(table: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table of the documentation."""
    yield "| theirs | in a recipe | to know |"
    yield "|---|---|---|"
    for row in table:
        theirs, ours = (", ".join(f"`{key}`" for key in keys.split()) for keys in (row.theirs, row.ours))
        yield f"| {theirs} | {ours or 'no counterpart'} | {row.note.replace('|', chr(92) + '|')} |"
