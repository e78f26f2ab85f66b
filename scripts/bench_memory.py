"""Measure what each memory mechanism saves and costs, into benchmarks/memory.json; what is there is not done again.

    python scripts/bench_memory.py price       bytes per parameter, peak predicted and measured, step time beside plain
    python scripts/bench_memory.py losses      evaluation loss after 300 steps of both quickstarts
    python scripts/bench_memory.py large       resident peak of BERT-Large, whole processes
    python scripts/bench_memory.py cuda        allocated bytes of BERT-Large on CUDA, predicted; with a GPU measured too
    python scripts/bench_memory.py table       the table of the README, from the file

Stop it at any time; started again it goes on. `--again ARM ...` measures these once more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_main_job import resident_peak
from provenance import provenance

RESULT = Path("benchmarks/memory.json")
README = Path("README.md")
BEGIN, END = "<!-- memory table -->", "<!-- end of memory table -->"

UNCLIPPED = ["train.max_grad_norm=null"]
RELEASE = [*UNCLIPPED, "optimizer.gradient_release=true"]
BF16, SPLIT24 = ["amp.precision=bf16"], ["amp.precision=bf16", "amp.master_weights=split24"]
FULL = ["recompute.policy=full"]
ARMS: dict[str, list[str]] = {
    "plain": [],
    "plain, no clipping": UNCLIPPED,
    "recompute selective": ["recompute.policy=selective"],
    "recompute full": FULL,
    "gradient release": RELEASE,
    "bf16": BF16,
    "bf16, split24": SPLIT24,
    "bf16, no master weights": [*BF16, "amp.master_weights=none"],
    "state bf16": ["optimizer.state=bf16"],
    "state 8bit": ["optimizer.state=8bit"],
    "state 4bit": ["optimizer.state=4bit"],
    "lamb": ["optimizer.name=lamb"],
    "muon": ["optimizer.name=muon"],
    "muon, state 8bit": ["optimizer.name=muon", "optimizer.state=8bit"],
    "adafactor": ["optimizer.name=adafactor"],
    "ladder 1: full": FULL,
    "ladder 2: + release": [*FULL, *RELEASE],
    "ladder 3: + bf16, split24": [*FULL, *RELEASE, *SPLIT24],
    "ladder 4: + state 8bit": [*FULL, *RELEASE, *SPLIT24, "optimizer.state=8bit"],
}
SAME_RUN = {
    "recompute selective": "plain",
    "recompute full": "plain",
    "gradient release": "plain, no clipping",
    "ladder 1: full": "plain",
    "ladder 2: + release": "plain, no clipping",
}
"""Arms whose every loss is bitwise another arm's, as tests/test_same_run.py holds: they are not trained again."""

LADDER_END = "ladder 4: + state 8bit"

PRICED = [
    "recipes/quickstart_bert.yaml", "model.hidden_size=512", "model.num_hidden_layers=8",
    "model.num_attention_heads=8", "data.vocab_size=8192", "train.masking_probability=0.15", "train.device=cpu",
    "train.dropout=0.1", "train.steps=1000", "train.compile=false",
]  # fmt: skip
WARM_UP_STEPS, TIMED_STEPS = 2, 5

LOSS_STEPS = 300
RECIPES = ("quickstart_bert", "quickstart_gpt")
SEEDS = {"plain": (1, 2, 3), LADDER_END: (1, 2, 3)}

LARGE_BASE = ["recipes/bert_large.yaml", "data.source=embedded", "train.device=cpu", "optimizer.name=adamw",
              "logging.every_steps=1", "train.steps=3", "train.eval_every=null"]  # fmt: skip
EXACT = ["amp.precision=fp32", *FULL]
LARGE: dict[str, tuple[tuple[int, int], list[str]]] = {
    "exact, release, 2 x 512": ((2, 512), [*EXACT, *RELEASE]),
    "exact, release, 8 x 128": ((8, 128), [*EXACT, *RELEASE]),
    "exact, clipped, 8 x 128": ((8, 128), EXACT),
    "AdamW quality, 8 x 128": ((8, 128), [*FULL, *RELEASE, *SPLIT24, "optimizer.state=8bit"]),
}
OFFLOAD = ["amp.precision=fp32", "recompute.policy=offload"]
CUDA_SECONDS = 140
MOST_GIB = {"exact, release, offload, 8 x 512": 4.5, "AdamW quality, 4 x 512": 2.0}
"""What the rows on CUDA may hold at most, in GiB allocated at the peak of a step."""

CUDA: dict[str, tuple[tuple[int, int], list[str]]] = {
    "exact, release, offload, 8 x 512": ((8, 512), [*OFFLOAD, *RELEASE]),
    "AdamW quality, 4 x 512": ((4, 512), [*FULL, *RELEASE, *SPLIT24, "optimizer.state=8bit"]),
}


def main() -> None:
    """Measure what is asked for and not there yet."""
    options = _options()
    if options.what == "arm":
        print("RESULT " + json.dumps(price(options.arm)))
    elif options.what == "table":
        write_table()
    elif options.what == "cuda":
        raise SystemExit(rows_on_cuda(options.output))
    else:
        {"price": measure_prices, "losses": measure_losses, "large": measure_large}[options.what](options.again)


def measure_prices(again: list[str]) -> None:
    """Price each arm in a process of its own."""
    for arm in ARMS:
        if arm in again or arm not in _read().get("price", {}):
            argv = [sys.executable, __file__, "arm", "--arm", arm]
            out = subprocess.run(argv, check=True, text=True, stdout=subprocess.PIPE).stdout
            found = json.loads(out.rpartition("RESULT ")[2])
            _keep("price", arm, found)
            print(
                f"{arm:28} {found['measured_peak_bytes'] / 2**20:8.1f} MiB  x {found['step_time_ratio']:.2f}",
                flush=True,
            )


def price(arm: str) -> dict[str, Any]:
    """Take steps of an arm and of plain in turn; return bytes and the ratio of median times."""
    from bigtrain.memory.measure import measure
    from bigtrain.memory.predict import predict

    peak = measure(lambda: _take_steps(ARMS[arm])).peak_bytes
    ours, plain = _Stepper(ARMS[arm]), _Stepper([])
    for stepper in (ours, plain):
        for _ in range(WARM_UP_STEPS):
            stepper.step()
    seconds: dict[str, list[float]] = {"arm": [], "plain": []}
    for _ in range(TIMED_STEPS):
        seconds["arm"].append(ours.timed())
        seconds["plain"].append(plain.timed())
    plan = ours.plan
    predicted = predict(plan.recipe, plan.model, device="cpu", slow_bf16=plan.hardware.slow_bf16)
    state = sum(plan.state_bytes.values())
    return {
        "overrides": ARMS[arm],
        "parameters": plan.parameters,
        "state_bytes_per_parameter": round(state / plan.parameters, 3),
        "predicted_peak_bytes": predicted.allocated_bytes_peak,
        "predicted_by_cause": dict(predicted.by_cause),
        "measured_peak_bytes": peak,
        "seconds": seconds,
        "step_time_ratio": statistics.median(seconds["arm"]) / statistics.median(seconds["plain"]),
    }


def _take_steps(overrides: list[str]) -> None:
    """Build an engine and take the steps after which nothing more is held."""
    stepper = _Stepper(overrides)
    for _ in range(WARM_UP_STEPS + 1):
        stepper.step()


class _Stepper:
    """An engine on the priced shape, with real rows."""

    def __init__(self, overrides: list[str]) -> None:
        import bigtrain
        from bigtrain.data.ensure import ensure_prepared
        from bigtrain.training.build import build_engine, build_loader

        self.plan = bigtrain.plan(bigtrain.load_recipe(PRICED[0], [*PRICED[1:], *overrides]))
        self._engine = build_engine(self.plan)
        self._batches = iter(build_loader(self.plan, ensure_prepared(self.plan.recipe)))

    def step(self) -> None:
        """Take one step."""
        for micro in self._engine.micro_batches(next(self._batches)):
            self._engine.backward(self._engine.model(**micro))
        self._engine.step(self.plan.recipe.train.max_grad_norm)

    def timed(self) -> float:
        """Take one step and return its seconds."""
        begin = time.perf_counter()
        self.step()
        return time.perf_counter() - begin


def measure_losses(again: list[str]) -> None:
    """Train both quickstarts for 300 steps with each arm and seed; keep the evaluation at the end."""
    for arm, overrides in ARMS.items():
        for recipe in RECIPES if arm not in SAME_RUN else ():
            for seed in SEEDS.get(arm, (1,)):
                key = f"{recipe} seed {seed}"
                if arm in again or key not in _read().get("losses", {}).get(arm, {}):
                    loss = _loss(recipe, seed, overrides)
                    _keep("losses", arm, {**_read().get("losses", {}).get(arm, {}), key: loss})
                    print(f"{arm:28} {key:28} {loss:.4f}", flush=True)


def _loss(recipe: str, seed: int, overrides: list[str]) -> float:
    length = [f"train.steps={LOSS_STEPS}", f"train.eval_every={LOSS_STEPS}", "train.eval_rows=null", f"seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        run = [
            "launch",
            f"recipes/{recipe}.yaml",
            "train.device=cpu",
            *length,
            *overrides,
            "--run-dir",
            f"{folder}/run",
        ]
        subprocess.run([sys.executable, "-m", "bigtrain", *run], check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    return float(next(row["eval_loss"] for row in reversed(rows) if "eval_loss" in row))


def measure_large(again: list[str]) -> None:
    """Measure the resident peak of three steps of BERT-Large and the final checkpoint, launcher included."""
    for name, ((rows, length), overrides) in LARGE.items():
        if name in again or name not in _read().get("large", {}):
            shape = [
                f"data.sequence_length={length}",
                f"train.global_batch_size={rows}",
                f"train.micro_batch_size={rows}",
            ]
            keys = [*LARGE_BASE, *shape, *overrides]
            subprocess.run([sys.executable, "-m", "bigtrain", "prepare", *keys], check=True, stdout=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                peak = resident_peak([sys.executable, "-m", "bigtrain", "launch", *keys, "--run-dir", f"{folder}/run"])
            seconds = time.perf_counter() - begin
            found = {"overrides": keys, "resident_peak_bytes": peak, "gib": round(peak / 2**30, 3), "seconds": seconds}
            _keep("large", name, found)
            print(f"{name:28} {peak / 2**30:.2f} GiB in {seconds:.0f} s", flush=True)


def rows_on_cuda(output: Path) -> int:
    """Predict the two rows of BERT-Large on CUDA, by cause, and measure them where torch sees a device.

    Returns the exit code: 1 where a row failed, or holds more than it may, also one that was measured before.
    """
    import torch

    from bigtrain.planner.hardware import Hardware, cuda_devices

    found = cuda_devices() if torch.cuda.is_available() else None
    hardware = found or Hardware("cuda", "a GPU of compute capability 9.0", 1, 80 * 2**30, capability=(9, 0))
    faults = 0
    for name, ((rows, length), overrides) in CUDA.items():
        shape = [f"data.sequence_length={length}", f"train.global_batch_size={rows}", f"train.micro_batch_size={rows}"]
        keys = [*LARGE_BASE, *shape, *overrides, "train.device=auto", "train.compile=false"]
        _keep("cuda_predicted_not_measured", name, _predicted_on_cuda(name, keys, hardware), output)
        if found is not None:
            kept = _read(output).get("cuda_measured", {}).get(name, {"error": ""})
            faults += _measure_on_cuda(name, keys, output) if "error" in kept else kept["gib"] > MOST_GIB[name]
    return 1 if faults else 0


def _predicted_on_cuda(name: str, keys: list[str], hardware: Any) -> dict[str, Any]:
    import bigtrain
    from bigtrain.memory.predict import predict

    plan = bigtrain.plan(bigtrain.load_recipe(keys[0], keys[1:]), hardware)
    report = predict(plan.recipe, plan.model, device="cuda", slow_bf16=False)
    peak = report.allocated_bytes_peak
    print(f"{name:34} {peak / 2**30:.2f} GiB predicted", flush=True)
    return {
        "allocated_bytes_peak": peak,
        "overrides": keys,
        "gib": round(peak / 2**30, 3),
        "by_cause": dict(report.by_cause),
    }


def _measure_on_cuda(name: str, keys: list[str], output: Path) -> bool:
    """Measure a row in a process of its own, keep it, and tell whether it failed or holds more than it may."""
    from measure_device import in_process

    found = in_process(keys, "cuda", CUDA_SECONDS)
    if "error" in found:
        text = f"failed: {found['error'].splitlines()[-1:]}"
    else:
        found["gib"] = round(found["measured"]["allocated_bytes_peak"] / 2**30, 3)
        found["at_most_gib"] = MOST_GIB[name]
        text = f"{found['gib']:.2f} GiB measured, at most {MOST_GIB[name]} wanted"
    _keep("cuda_measured", name, found, output)
    print(f"{name:34} {text}", flush=True)
    return "error" in found or found["gib"] > MOST_GIB[name]


def _read(file: Path = RESULT) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return result


def _keep(part: str, arm: str, found: dict[str, Any], file: Path = RESULT) -> None:
    """Add a result to the file, which is whole at any time."""
    result = _read(file)
    result.setdefault(part, {})[arm] = found
    result.setdefault("provenance", {})[part] = {**provenance(), "priced": PRICED} if part == "price" else provenance()
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(file)


def write_table() -> None:
    """Put the table into the README, between its marks."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{table(_read())}\n{END}{after}", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """Return the table of the README as Markdown."""
    head = "| | state, B per parameter | peak, MiB | predicted | step time | loss of BERT | of GPT |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for arm in ARMS:
        found, losses = result["price"][arm], result["losses"].get(arm)
        measured, predicted = found["measured_peak_bytes"], found["predicted_peak_bytes"]
        cells = [
            arm,
            f"{found['state_bytes_per_parameter']:.2f}",
            f"{measured / 2**20:.1f}",
            f"{predicted / measured - 1:+.2%}",
            f"x {found['step_time_ratio']:.2f}",
            *(_losses(losses, recipe) if losses else f"as {SAME_RUN[arm]}" for recipe in RECIPES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _losses(losses: dict[str, float], recipe: str) -> str:
    found = sorted(loss for key, loss in losses.items() if key.startswith(recipe))
    return f"{found[0]:.3f}" if len(found) == 1 else f"{found[0]:.3f} to {found[-1]:.3f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what each memory mechanism saves and costs.")
    parser.add_argument("what", choices=["price", "losses", "large", "cuda", "table", "arm"])
    parser.add_argument("--arm", choices=list(ARMS))
    parser.add_argument("--again", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=RESULT, help="where the rows on CUDA go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
