"""The arms of transformers' Trainer: as it is started by default, compiled, and with DeepSpeed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from arms.clock import Clock
from arms.facts import CONFIG, their_dropout
from arms.job import CannotRun, Job
from arms.rows import Source, padded

KINDS = {"bert": "BertForMaskedLM", "gpt": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}


def run(job: Job) -> dict[str, Any]:
    """Train transformers' model of the same shape with its Trainer on the job's rows."""
    if importlib.util.find_spec("transformers") is None:
        raise CannotRun("transformers is not installed")
    extra = {"hf": _default, "hf-compile": _compiled, "hf-deepspeed": _deepspeed}[job.arm](job)
    import transformers

    plan = job.plan()
    if plan.recipe.amp.precision not in ("fp32", "bf16"):
        raise CannotRun(f"amp.precision={plan.recipe.amp.precision}; the arms are compared in fp32 and bf16")
    rows, tokens = Source(plan, job).rows()
    clock, sums = Clock(plan.hardware.kind, job.steps), []

    class Timed(transformers.Trainer):
        """A Trainer whose losses are kept: it returns each micro-batch's share of its step's mean."""

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            loss = super().training_step(*arguments, **named)
            sums.append(loss)
            return loss

    class Ends(transformers.TrainerCallback):
        def on_step_end(self, *_arguments: Any, **_named: Any) -> None:
            clock.step(sum(sums))
            sums.clear()

    with TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(**_arguments(plan, job, folder, clock.steps), **extra)
        model = _model(plan, job)
        trainer = Timed(
            model=model,
            args=arguments,
            train_dataset=rows,
            callbacks=[Ends()],
            data_collator=padded if job.mode == "documents" else None,
        )
        trainer.train()
    return {**clock.result(tokens), "attention": model.config._attn_implementation, "optimizer": str(arguments.optim)}


def _arguments(plan: Any, job: Job, folder: str, steps: int) -> dict[str, Any]:
    recipe = plan.recipe
    section = recipe.optimizer
    return {
        "output_dir": folder,
        "per_device_train_batch_size": job.rows,
        "gradient_accumulation_steps": job.accumulation,
        "max_steps": steps,
        "learning_rate": section.learning_rate,
        "weight_decay": section.weight_decay,
        "adam_beta1": section.betas[0],
        "adam_beta2": section.betas[1],
        "adam_epsilon": section.eps,
        "max_grad_norm": recipe.train.max_grad_norm or 0.0,
        "lr_scheduler_type": "constant",
        "bf16": recipe.amp.precision == "bf16",
        "use_cpu": plan.hardware.kind == "cpu",
        "gradient_checkpointing": job.checkpointing,
        "train_sampling_strategy": "sequential",
        "seed": recipe.seed,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _model(plan: Any, job: Job) -> Any:
    import transformers

    model = _made(plan, job, getattr(transformers, KINDS[plan.model.family]))
    if plan.model.family == "bert":  # it takes the number of labels of a step among others, and makes no use of it
        model.accepts_loss_kwargs = False
    return model


def _made(plan: Any, job: Job, kind: Any) -> Any:
    import torch

    chosen = {"attn_implementation": "sdpa"} if job.arm == "hf-compile" else {}
    if (Path(job.folder) / CONFIG).is_file():
        return kind.from_pretrained(job.folder, dtype=torch.float32, **chosen)
    from bigtrain.models.hf_config import config_to_json

    with torch.device(plan.hardware.kind):
        return kind._from_config(kind.config_class(**config_to_json(plan.model) | their_dropout(plan)), **chosen)


def _default(_job: Job) -> dict[str, Any]:
    return {}


def _compiled(_job: Job) -> dict[str, Any]:
    return {"torch_compile": True, "optim": "adamw_torch_fused"}


def _deepspeed(job: Job) -> dict[str, Any]:
    if importlib.util.find_spec("deepspeed") is None:
        raise CannotRun("deepspeed is not installed")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    os.environ |= alone
    if job.plan().hardware.kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    config = {
        "zero_optimization": {"stage": job.zero_stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
    }
    return {"deepspeed": config}
