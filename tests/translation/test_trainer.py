"""Arguments of transformers' Trainer, as its JSON and as people write them, each a recipe that loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.load import load_recipe
from bigtrain.config.schema import Recipe
from bigtrain.errors import InputError
from bigtrain.translation.draft import Draft
from bigtrain.translation.tables import TRAINER
from bigtrain.translation.trainer import OPTIMIZERS, SCHEDULES, translate_trainer

PRETRAINING = {
    "output_dir": "/data/runs/my bert/",
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 4,
    "max_steps": 100_000,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.06,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.0,
    "bf16": True,
    "gradient_checkpointing": True,
    "torch_compile": True,
    "logging_steps": 50,
    "evaluation_strategy": "steps",
    "eval_steps": 1000,
    "save_steps": 2000,
    "save_total_limit": 1,
    "report_to": ["tensorboard", "clearml"],
    "seed": 7,
    "dataloader_num_workers": 8,
    "group_by_length": True,
    "optim": "adamw_bnb_8bit",
    "label_smoothing_factor": 0.1,
    "ddp_timeout": 600,
    "nonsense": 3,
    "per_device_eval_batch_size": 64,
}


def loaded(draft: Draft, folder: Path) -> Recipe:
    file = folder / "translated.yaml"
    file.write_text(draft.text())
    return load_recipe(file)


def test_a_pretraining_of_bert(tmp_path: Path) -> None:
    draft = translate_trainer(PRETRAINING, "args.json", world_size=8, preset="bert-base")
    recipe = loaded(draft, tmp_path)
    train, optimizer = recipe.train, recipe.optimizer
    assert (recipe.name, recipe.seed) == ("my-bert", 7)
    assert (train.global_batch_size, train.micro_batch_size, train.steps, train.eval_every) == (1024, 32, 100_000, 1000)
    assert (train.max_grad_norm, train.label_smoothing, train.compile) == (None, 0.1, True)
    assert (optimizer.name, optimizer.state, optimizer.schedule) == ("adamw", "8bit", "cosine")
    assert (optimizer.learning_rate, optimizer.betas, optimizer.eps) == (1e-4, [0.9, 0.98], 1e-6)
    assert optimizer.warmup_steps == "6%" and optimizer.weight_decay == 0.01
    assert recipe.amp.precision == "bf16" and recipe.recompute.policy == "full"
    assert (recipe.checkpoint.every_steps, recipe.checkpoint.keep) == (2000, 2)
    assert recipe.logging.every_steps == 50 and recipe.logging.trackers == ["tensorboard"]
    assert recipe.cluster.timeout == 600.0
    told = "\n".join(draft.missing)
    for key in ("nonsense: unknown", "group_by_length", "dataloader_num_workers", "report_to: clearml"):
        assert key in told
    assert "eval_batch" not in told
    assert any("ends at a tenth of the peak, theirs at 0" in note for note in draft.changes)
    assert "  warmup_steps: 6%  # warmup_ratio\n" in draft.text()


def test_nothing_written_is_the_trainers_defaults(tmp_path: Path) -> None:
    draft = translate_trainer({}, "args.json")
    recipe = loaded(draft, tmp_path)
    assert (recipe.train.epochs, recipe.train.global_batch_size, recipe.train.eval_every) == (3.0, 8, None)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.eps, recipe.optimizer.weight_decay) == (5e-5, 1e-8, 0.0)
    assert recipe.logging.every_steps == 500 and recipe.logging.trackers == [] and recipe.amp.precision == "fp32"
    assert draft.missing == [] and any("say --world-size N" in note for note in draft.changes)


@pytest.mark.slow
def test_what_transformers_itself_writes(tmp_path: Path) -> None:
    import json

    from transformers import TrainingArguments

    args = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=50, warmup_steps=0.1, use_cpu=True,
        report_to=["tensorboard"], learning_rate=2e-4, save_strategy="no", adam_beta1=0.8,
    )  # fmt: skip
    draft = translate_trainer(json.loads(args.to_json_string()), "args.json", world_size=2)
    recipe = loaded(draft, tmp_path)
    assert (recipe.train.global_batch_size, recipe.train.steps, recipe.train.device) == (8, 50, "cpu")
    assert (recipe.optimizer.warmup_steps, recipe.optimizer.learning_rate) == ("10%", 2e-4)
    assert recipe.optimizer.betas == [0.8, 0.999] and recipe.checkpoint.every_steps is None
    assert draft.missing == []
    assert len(draft.changes) == 1 and draft.changes[0].startswith("save_total_limit")


@pytest.mark.slow
def test_every_optimizer_and_schedule_of_transformers_is_known_or_lacks_a_counterpart() -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames, TrainingArguments

    assert {kind.value for kind in SchedulerType} >= set(SCHEDULES)
    gone = {"adamw_hf", "adamw_apex_fused", "paged_adamw"}
    assert {kind.value for kind in OptimizerNames} >= set(OPTIMIZERS) - gone
    fields = set(TrainingArguments.__dataclass_fields__)
    named = {key for row in TRAINER for key in row.keys if "." not in key}
    old = {
        "warmup_ratio", "adafactor", "no_cuda", "overwrite_output_dir", "group_by_length", "push_to_hub_model_id",
        "evaluation_strategy", "per_gpu_train_batch_size", "fp16_opt_level", "fp16_backend", "half_precision_backend",
        "sharded_ddp", "torchdynamo", "tpu_*", "use_ipex", "jit_mode_eval", "use_mps_device", "mp_parameters",
        "xpu_backend",
    }  # fmt: skip
    assert named - fields <= old
    draft = translate_trainer(dict.fromkeys(fields), "args.json")
    assert not [note for note in draft.missing if "unknown" in note]


def test_nested_deepspeed_takes_auto_from_the_arguments(tmp_path: Path) -> None:
    deepspeed = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_max_lr": "auto",
                                                          "warmup_num_steps": "auto", "warmup_type": "linear"}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"},
        "flops_profiler": {"enabled": True},
    }  # fmt: skip
    values = {"max_steps": 70, "learning_rate": 3e-4, "warmup_steps": 7, "bf16": True, "deepspeed": deepspeed}
    draft = translate_trainer(values, "args.json", world_size=4)
    recipe = loaded(draft, tmp_path)
    assert (recipe.sharding.zero_stage, recipe.sharding.offload) == (2, "optimizer")
    assert (recipe.train.steps, recipe.optimizer.learning_rate, recipe.optimizer.warmup_steps) == (70, 3e-4, 7)
    assert recipe.amp.precision == "bf16" and recipe.optimizer.schedule == "linear"
    assert [note.split(":")[0] for note in draft.missing] == ["flops_profiler.enabled"]
    told = translate_trainer({"deepspeed": "ds.json"}, "args.json").changes
    assert any("ds.json: a file of its own; give it to `bigtrain recipes from-deepspeed`" in note for note in told)


@pytest.mark.parametrize(
    ("values", "stage", "offload", "policy"),
    [
        ({"fsdp": "full_shard auto_wrap"}, 3, "auto", "auto"),
        ({"fsdp": ["shard_grad_op", "offload"]}, 2, "all", "auto"),
        ({"fsdp": True, "fsdp_config": {"reshard_after_forward": False, "cpu_offload": True}}, 2, "all", "auto"),
        ({"fsdp": True, "fsdp_config": {"version": 2, "activation_checkpointing": True}}, 3, "auto", "full"),
        ({"fsdp": "no_shard"}, 0, "auto", "auto"),
        ({"fsdp": "", "fsdp_config": {"min_num_params": 5}}, "auto", "auto", "auto"),
    ],
)
def test_fsdp(values: dict[str, Any], stage: object, offload: str, policy: str, tmp_path: Path) -> None:
    recipe = loaded(translate_trainer(values, "f"), tmp_path)
    assert (recipe.sharding.zero_stage, recipe.sharding.offload) == (stage, offload)
    assert recipe.recompute.policy == policy


def test_hybrid_sharding_is_told() -> None:
    assert any("number of nodes" in note for note in translate_trainer({"fsdp": "hybrid_shard"}, "f").changes)


@pytest.mark.parametrize(
    ("values", "key", "expected"),
    [
        ({"lr_scheduler_type": "constant", "warmup_steps": 10}, "optimizer.warmup_steps", None),
        ({"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"a": 5}}, "optimizer.schedule", "wsd"),
        ({"lr_scheduler_type": "inverse_sqrt"}, "optimizer.schedule", "linear"),
        ({"optim": "lion_8bit"}, "optimizer.name", "adamw"),
        ({"optim": "paged_adamw_8bit"}, "optimizer.state", "8bit"),
        ({"adafactor": True}, "optimizer.name", "adafactor"),
        ({"auto_find_batch_size": True}, "train.micro_batch_size", "auto"),
        ({"save_strategy": "epoch"}, "checkpoint.every_steps", None),
        ({"eval_strategy": "epoch"}, "train.eval_every", None),
        ({"eval_strategy": "steps", "logging_steps": 20}, "train.eval_every", 20),
        ({"save_steps": 0.1}, "checkpoint.every_steps", None),
        ({"report_to": "comet_ml"}, "logging.trackers", ["comet"]),
        ({"report_to": "none"}, "logging.trackers", []),
        ({"num_train_epochs": 0.5}, "train.epochs", 0.5),
        ({"warmup_steps": 0.125}, "optimizer.warmup_steps", "12.5%"),
    ],
)  # fmt: skip
def test_details(values: dict[str, Any], key: str, expected: object) -> None:
    assert translate_trainer(values, "f").lines.get(key, (None,))[0] == expected


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"bf16": True, "fp16": True}, "f: fp16: is true beside bf16; keep one"),
        ({"per_device_train_batch_size": 0}, "f: per_device_train_batch_size: 0 is below 1; write 1 or more"),
        ({"report_to": [{}]}, "f: report_to: [{}] is not a text or a list of texts; write a text or a list of texts"),
        ({"fsdp": [{}]}, "f: fsdp: [{}] is not a text or a list of texts"),
        ({"fsdp": [1]}, "f: fsdp: [1] is not a text or a list of texts"),
        ({"deepspeed": {"optimizer": {"type": 5}}}, "f: optimizer.type: 5 is not a text"),
        ({"deepspeed": {"bf16": {"enabled": True}, "fp16": {"enabled": True}}}, "f: fp16.enabled: is true beside bf16"),
        ({"learning_rate": "quick"}, "f: learning_rate: 'quick' is not a number; write a number"),
        ({"learning_rate": -1}, "f: learning_rate: optimizer.learning_rate: -1"),
        ({"max_steps": 10, "warmup_steps": 20}, "warmup_steps: optimizer.warmup_steps: 20 steps of warm-up are longer"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(values: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as raised:
        translate_trainer(values, "f")
    assert told in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("schedule", "settings", "missing", "changes"),
    [
        ("linear", {"a": 5}, ["lr_scheduler_kwargs.a"], 0),
        ("linear", '{"a": 5}', ["lr_scheduler_kwargs"], 0),
        ("linear", {}, [], 0),
        ("polynomial", {"power": 2.0, "lr_end": 0.5}, ["lr_scheduler_kwargs.power, lr_scheduler_kwargs.lr_end"], 1),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, [], 0),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}, ["lr_scheduler_kwargs.min_lr_rate"], 1),
    ],
)
def test_settings_of_a_schedule(schedule: str, settings: object, missing: list[str], changes: int) -> None:
    draft = translate_trainer({"lr_scheduler_type": schedule, "lr_scheduler_kwargs": settings}, "f")
    assert [note.partition(": ")[0] for note in draft.missing] == missing
    assert sum(note.startswith("lr_scheduler_type") for note in draft.changes) == changes
