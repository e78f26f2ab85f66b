"""Time a recipe's training step, and that of transformers' Trainer on the same rows beside it.

    python scripts/bench_step.py recipes/quickstart_gpt.yaml model.hidden_size=384 ... --against hf --output FILE

Arms run in turn, each in a process of its own, several rounds; the first steps of each are dropped. Prints one JSON
object: median seconds of a step and tokens/s of each arm, the ratio of each round, raw step times, versions, command
and commit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import provenance

WARM_UP_STEPS = 3


def main() -> None:
    """Run the rounds and print the result."""
    options = _options()
    if options.arm:
        print("RESULT " + json.dumps(run_arm(options.arm, options.recipe, options.overrides, options.steps)))
        return
    arms = ["bigtrain", *([options.against] if options.against else [])]
    rounds: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        rounds.append({arm: _in_process(arm, options) for arm in arms})
        print(
            {arm: f"{result['tokens_per_second']:.0f} tokens/s" for arm, result in rounds[-1].items()}, file=sys.stderr
        )
    result = {**provenance(), **summarize(rounds, arms)}
    text = json.dumps(result, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def summarize(rounds: list[dict[str, Any]], arms: list[str]) -> dict[str, Any]:
    """Return the medians over rounds of each arm, and the ratio of the first arm's tokens/s to each other's."""
    found: dict[str, Any] = {"rounds": rounds}
    for arm in arms:
        found[arm] = {
            key: statistics.median(one[arm][key] for one in rounds)
            for key in ("tokens_per_second", "seconds_per_step", "host_bytes_peak")
        }
    for arm in arms[1:]:
        ratios = [one[arms[0]]["tokens_per_second"] / one[arm]["tokens_per_second"] for one in rounds]
        found[f"ratio_to_{arm}"] = {"median": statistics.median(ratios), "rounds": ratios}
    return found


def run_arm(arm: str, recipe: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """Take the steps of one arm in this process."""
    import bigtrain
    from bigtrain.training.runtime import host_bytes_peak

    plan = bigtrain.plan(bigtrain.load_recipe(recipe, overrides))
    run = {"bigtrain": run_bigtrain, "hf": run_hf}[arm]
    seconds, tokens = run(plan, steps + WARM_UP_STEPS)
    seconds, tokens = seconds[WARM_UP_STEPS:], tokens[WARM_UP_STEPS:]
    median = statistics.median(seconds)
    return {
        "seconds_per_step": median,
        "tokens_per_second": statistics.median(tokens) / median,
        "host_bytes_peak": host_bytes_peak(),
        "step_seconds": seconds,
    }


def run_bigtrain(plan: Any, steps: int) -> tuple[list[float], list[int]]:
    """Train with the engine and loader that ship; the loader's and Python's time are inside a step."""
    from bigtrain.data.ensure import ensure_prepared
    from bigtrain.training.build import build_engine, build_loader
    from bigtrain.training.runtime import seed_step

    loader = build_loader(plan, ensure_prepared(plan.recipe))
    engine = build_engine(plan)
    rows, seconds, tokens = iter(loader), [], []
    for step in range(steps):
        begin = time.perf_counter()
        seed_step(plan.recipe.seed, step)
        batch = next(rows)
        for micro in engine.micro_batches(batch):
            engine.backward(engine.model(**micro))
        float(engine.step(plan.recipe.train.max_grad_norm).loss)
        seconds.append(time.perf_counter() - begin)
        tokens.append(int(batch["document_lengths"].sum()))
    loader.close()
    return seconds, tokens


def run_hf(plan: Any, steps: int) -> tuple[list[float], list[int]]:
    """Train transformers' model of the same shape with its Trainer on the same rows, each a full sequence."""
    import transformers

    rows, tokens = _rows_for_hf(plan, steps)
    model = _hf_model(plan)
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            ends.append(time.perf_counter())

    recipe = plan.recipe
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=plan.micro_batch_size,
            gradient_accumulation_steps=plan.accumulation_steps,
            max_steps=steps,
            learning_rate=recipe.optimizer.learning_rate,
            weight_decay=recipe.optimizer.weight_decay,
            bf16=recipe.amp.precision == "bf16",
            use_cpu=plan.hardware.kind == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return [end - begin for begin, end in itertools.pairwise(ends)], tokens


def _rows_for_hf(plan: Any, steps: int) -> tuple[list[dict[str, Any]], list[int]]:
    from bigtrain.data.ensure import ensure_prepared
    from bigtrain.training.build import build_loader

    loader = build_loader(plan, ensure_prepared(plan.recipe))
    rows, tokens = [], []
    causal = plan.model.causal
    for batch, _ in zip(loader, range(steps), strict=False):
        ids = batch["input_ids"]
        labels = ids if causal else batch["labels"]
        rows += [{"input_ids": one, "labels": other} for one, other in zip(ids, labels, strict=True)]
        tokens.append(int(batch["document_lengths"].sum()))
    loader.close()
    return rows, tokens


def _hf_model(plan: Any) -> Any:
    import transformers

    from bigtrain.models.hf import to_hugging_face
    from bigtrain.training.build import build_plan_model

    config, _ = to_hugging_face(plan.model, build_plan_model(plan).state_dict())
    kind = {"bert": "BertForMaskedLM", "gpt": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[plan.model.family]
    dropout = plan.recipe.train.dropout
    config |= {"hidden_dropout_prob": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout}
    config |= {"attention_probs_dropout_prob": 0.0, "attn_pdrop": 0.0}
    model_class = getattr(transformers, kind)
    return model_class(model_class.config_class(**config))


def _in_process(arm: str, options: argparse.Namespace) -> Any:
    argv = [sys.executable, __file__, options.recipe, *options.overrides, "--steps", str(options.steps), "--arm", arm]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if ran.returncode or not lines:
        raise SystemExit(f"{arm}: exit {ran.returncode}\n{ran.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--against", choices=["hf"])
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each arm in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--arm", choices=["bigtrain", "hf"], help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
