"""What somebody meant who wrote a key that does not exist."""

from __future__ import annotations

from bigtrain.config.keys import listed, schema_keys, sections, words_of
from bigtrain.errors import edit_distance, nearest_word

# Names that other training tools use: the key here, or a sentence (with a space) where there is none.
ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("n_embd", "d_model", "dim", "embed_dim", "hidden_dim", "width"), "model.hidden_size"),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "depth", "layers"), "model.num_hidden_layers"),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "heads"), "model.num_attention_heads"),
    **dict.fromkeys(("n_kv_head", "n_kv_heads", "num_kv_heads", "num_query_groups"), "model.num_key_value_heads"),
    **dict.fromkeys(("n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"), "model.intermediate_size"),
    **dict.fromkeys(("n_positions", "n_ctx", "max_seq_len"), "model.max_position_embeddings"),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"), "model.norm_eps"),
    **dict.fromkeys(("model_type", "architecture", "arch"), "model.family"),
    **dict.fromkeys(("model_name", "model_name_or_path", "config_name"), "model.preset"),
    **dict.fromkeys(("tie_embeddings", "tied_embeddings", "weight_tying"), "model.tie_word_embeddings"),
    **dict.fromkeys(("dataset", "dataset_name", "dataset_path", "train_file", "data_path", "path"), "data.source"),
    **dict.fromkeys(("dataset_config_name", "dataset_config"), "data.subset"),
    **dict.fromkeys(("text_field", "column", "text_key"), "data.text_column"),
    **dict.fromkeys(("do_lower_case", "uncased"), "data.lowercase"),
    **dict.fromkeys(("tokenizer_name", "tokenizer_path", "tokenizer_file"), "data.tokenizer"),
    **dict.fromkeys(
        ("max_seq_length", "block_size", "seq_len", "seq_length", "context_length", "max_length", "max_source_length"),
        "data.sequence_length",
    ),
    **dict.fromkeys(
        ("per_device_train_batch_size", "device_batch_size", "train_micro_batch_size_per_gpu", "batch_size_per_gpu"),
        "train.micro_batch_size",
    ),
    **dict.fromkeys(("batch_size", "train_batch_size", "total_batch_size"), "train.global_batch_size"),
    **dict.fromkeys(("max_steps", "total_steps", "num_steps", "max_iters", "train_steps", "iterations"), "train.steps"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "max_epochs"), "train.epochs"),
    **dict.fromkeys(("train_tokens", "num_tokens"), "train.tokens"),
    **dict.fromkeys(("eval_steps", "eval_interval", "evaluation_strategy", "eval_strategy"), "train.eval_every"),
    **dict.fromkeys(("mlm_probability", "mask_prob", "masked_lm_prob", "mlm_prob"), "train.masking_probability"),
    **dict.fromkeys(("hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "hidden_dropout"), "train.dropout"),
    **dict.fromkeys(("attention_probs_dropout_prob", "attn_pdrop"), "train.attention_dropout"),
    **dict.fromkeys(("max_norm", "grad_clip", "clip_grad_norm", "clip_grad", "gradient_clip"), "train.max_grad_norm"),
    **dict.fromkeys(("label_smoothing_factor",), "train.label_smoothing"),
    **dict.fromkeys(("torch_compile",), "train.compile"),
    **dict.fromkeys(("resume_from", "checkpoint_path", "pretrained", "init_checkpoint"), "train.init_from"),
    **dict.fromkeys(("lr", "max_lr", "peak_lr"), "optimizer.learning_rate"),
    **dict.fromkeys(("wd",), "optimizer.weight_decay"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "beta1", "beta2"), "optimizer.betas"),
    **dict.fromkeys(("adam_epsilon", "epsilon", "adam_eps"), "optimizer.eps"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "lr_schedule", "lr_decay_style"), "optimizer.schedule"),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps", "warmup_proportion"), "optimizer.warmup_steps"),
    **dict.fromkeys(("optim", "optimizer_name"), "optimizer.name"),
    **dict.fromkeys(("fp16", "bf16", "fp8", "fp32", "mixed_precision", "dtype", "torch_dtype"), "amp.precision"),
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing", "recompute_granularity"), "recompute.policy"
    ),
    **dict.fromkeys(("zero", "stage", "fsdp", "zero_optimization", "sharding_strategy"), "sharding.zero_stage"),
    **dict.fromkeys(("tp", "tensor_parallel_size", "tensor_model_parallel_size"), "sharding.tensor_parallel"),
    **dict.fromkeys(("dp_replicate",), "sharding.replicate"),
    **dict.fromkeys(("cpu_offload", "offload_optimizer"), "sharding.offload"),
    **dict.fromkeys(("memory_budget", "max_memory"), "memory.budget"),
    **dict.fromkeys(("save_steps", "save_interval", "checkpoint_interval", "save_every"), "checkpoint.every_steps"),
    **dict.fromkeys(("save_total_limit", "keep_last"), "checkpoint.keep"),
    **dict.fromkeys(("logging_steps", "log_interval", "log_every", "log_steps"), "logging.every_steps"),
    **dict.fromkeys(("report_to", "tracker"), "logging.trackers"),
    **dict.fromkeys(("num_nodes", "nnodes"), "cluster.nodes"),
    **dict.fromkeys(("num_gpus", "nproc_per_node", "gpus_per_node", "gpus"), "cluster.devices_per_node"),
    **dict.fromkeys(("master_addr", "rdzv_endpoint", "main_process_ip"), "cluster.rendezvous"),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "accumulation_steps", "accumulate_grad_batches", "grad_accum_steps"),
        "it follows from train.global_batch_size, train.micro_batch_size and the number of devices",
    ),
    **dict.fromkeys(
        ("output_dir", "run_dir", "save_dir"), "the run folder is the option --run-dir, or follows from 'name'"
    ),
}

_FOLDED = {name.replace("_", ""): target for name, target in ELSEWHERE.items()}


def suggestion(key: str, *, full: bool = False) -> str:
    """Return "; ..." that says what may have been meant by an unknown dotted key, or else which keys there are.

    `full` names keys with their section, as overrides want them; else the section is named only where it is another.
    """
    if not (meant := meant_key(key)):
        return _known(key.rpartition(".")[0])
    if " " in meant:
        return f"; {meant}"
    section, _, word = meant.rpartition(".")
    written_section, _, written = key.rpartition(".")
    if full:
        return f"; did you mean {meant!r}?"
    if section == written_section:
        return f"; did you mean {word!r}?"
    homes = [f"{name!r}" for name in sections() if word in words_of(name)]
    if _fold(written) == _fold(word):
        return f"; it belongs to {listed(homes)}" if homes else f"; write {word!r} at the top, outside of the sections"
    return f"; did you mean {meant!r}?"


def _known(section: str) -> str:
    """Return "; ..." that names the keys of a section, or of a recipe where there is no such section."""
    return f"; {section if section in sections() else 'a recipe'} has {listed(words_of(section), 'and')}"


def meant_key(key: str) -> str | None:
    """Return the dotted key, or the sentence, that an unknown dotted key stands for."""
    section, _, word = key.rpartition(".")
    if section and section not in sections():
        # A slip in the section's own name: the whole dotted key is compared.
        near = nearest_word(key, schema_keys(), likeness=0.75)
        return near or _FOLDED.get(_fold(word)) or _elsewhere(word, 0.9)
    if not section and (dotted := _with_its_dot(word)):
        return dotted
    near = nearest_word(word, words_of(section))
    if near and edit_distance(_fold(word), _fold(near)) <= 1:
        return _joined(section, near)
    if known := _FOLDED.get(_fold(word)) or _elsewhere(word, 1.0):
        return known
    return _joined(section, near) if near else _elsewhere(word, 0.75)


def _with_its_dot(word: str) -> str | None:
    """Return the dotted key that this is without its dot, or with another letter in its place."""
    for key in schema_keys():
        section, dot, last = key.partition(".")
        if dot and word.startswith(section) and word.endswith(last) and len(key) - 1 <= len(word) <= len(key):
            return key
    return None


def _elsewhere(word: str, likeness: float) -> str | None:
    """Return the key of any section whose last word is at least this much like the given one."""
    words = {key.rpartition(".")[2]: key for key in reversed(list(schema_keys()))}
    exact = [name for name in words if _fold(name) == _fold(word)]
    if likeness == 1.0:
        return words[exact[0]] if exact else None
    near = nearest_word(word, words, likeness=likeness)
    return words[near] if near else None


def _joined(section: str, word: str) -> str:
    return f"{section}.{word}" if section else word


def _fold(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")
