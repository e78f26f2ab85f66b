"""Measure training steps on a GPU beside their prediction: bytes allocated, reserved, taken from the device; seconds.

    python scripts/measure_device.py                    what is missing, for at most ten minutes
    python scripts/measure_device.py --device cpu       a tiny list on the CPU, to try the script
    python scripts/measure_device.py --list             the configurations that fit this device, and stop
    python scripts/measure_device.py --name             the device's folder, and stop; ends with 2 where torch sees none

Every configuration runs in a process of its own and is written to benchmarks/measured/DEVICE/NAME.json at once: stop it
at any time, started again it goes on. CI holds all predictions against these files without a GPU. A configuration that
fails is written too, with its error, and measured again once no other is left. It needs no network and no data: rows
are drawn. Ends with 0 when all are measured, with 75 where some are left, with 1 where some failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from device_cases import Case, cases, tiny_cases
from provenance import provenance

REPOSITORY = Path(__file__).parents[1]
FOLDER, RECIPES = Path("benchmarks/measured"), REPOSITORY / "recipes"
WARM_UP_STEPS, TIMED_STEPS = 3, 5
RUN_SECONDS, CASE_SECONDS = 570, 120
UNFINISHED = 75
"""The exit code of what goes on when it is started again."""

TOLERANCES = {"allocated_bytes_peak": 0.02, "reserved_bytes_peak": 0.05, "seconds_per_step": 0.15}
"""How far a prediction may be from what was measured, of it; where one of them is absent, nothing is compared."""

MOST_OF_DEVICE = 0.94
"""A configuration is measured where it is predicted to allocate at most so much of the device's memory."""


def main() -> int:
    """Measure what is missing, until the time is over; return the exit code."""
    options = _options()
    hardware = _hardware(options.device)
    if options.case:
        print("RESULT " + json.dumps(measure(json.loads(options.case), hardware)))
        return 0
    if options.name:
        print(folder_of(hardware))
        return 0
    every = list(tiny_cases() if hardware.kind == "cpu" else cases())
    chosen = [case for case in every if _fits(case, hardware)]
    if options.list:
        print("\n".join(name for name, _ in chosen))
        return 0
    if not chosen:
        raise SystemExit(f"none of {len(every)} configurations fits {hardware.name}: nothing was measured")
    folder = options.output or FOLDER / folder_of(hardware)
    folder.mkdir(parents=True, exist_ok=True)
    return _measure_all(chosen, folder, hardware, time.monotonic() + options.seconds)


def _measure_all(chosen: list[Case], folder: Path, hardware: Any, end: float) -> int:
    """Measure what has no file yet, then what failed before; return the exit code."""
    failed = 0
    left = [case for case in chosen if not _is_measured(folder / f"{case[0]}.json")]
    for name, keys in sorted(left, key=lambda case: (folder / f"{case[0]}.json").is_file()):
        if time.monotonic() + CASE_SECONDS / 4 > end:
            print("out of time; start again to go on", flush=True)
            return UNFINISHED
        found = in_process(keys, hardware.kind, min(CASE_SECONDS, end - time.monotonic()))
        failed += "error" in found
        _write(folder / f"{name}.json", {"name": name, "overrides": keys, **found, **provenance()})
        print(f"{name:48} {_line(found)}", flush=True)
    print(f"{len(chosen)} configurations fit, {len(chosen) - failed} are measured, {failed} failed")
    return 1 if failed else 0


def folder_of(hardware: Any) -> str:
    """Return the name of the folder that holds what was measured on a device."""
    return re.sub(r"[^a-z0-9]+", "-", (_table_name(hardware) or hardware.name).lower()).strip("-")


def measure(keys: list[str], hardware: Any) -> dict[str, Any]:
    """Take steps of one configuration in this process; return what was predicted and measured."""
    from bigtrain.data.cache import cache_folder
    from bigtrain.training.build import build_engine
    from bigtrain.training.peak import peak_flops

    plan = _plan(keys, hardware)
    if hardware.kind == "cuda":
        peak_flops(hardware, plan.recipe.amp.precision, cache_folder(plan.recipe.data))
    before = _device_bytes(hardware.kind)
    facts = {name: getattr(hardware, name) for name in ("kind", "name", "memory_bytes", "capability")}
    found = {"device": facts, "predicted": predicted(plan)}
    engine, batch, seconds = build_engine(plan), _batch(plan), []
    bytes_found = {}
    for step in range(WARM_UP_STEPS + TIMED_STEPS):
        if step == 1:
            _reset_peak(hardware.kind)
        begin = time.perf_counter()
        for micro in engine.micro_batches(batch):
            engine.backward(engine.model(**micro))
        float(engine.step(plan.recipe.train.max_grad_norm).loss)
        seconds.append(time.perf_counter() - begin)
        if step == 1:
            bytes_found = _peaks(hardware.kind, before)
    timed = seconds[WARM_UP_STEPS:]
    measured = {**bytes_found, "seconds_per_step": statistics.median(timed), "step_seconds": timed}
    return {**found, "measured": measured}


def predicted_again(record: dict[str, Any]) -> dict[str, Any]:
    """Return what is predicted today for a configuration that was measured, wherever that was."""
    from bigtrain.planner.devices import device_of_driver
    from bigtrain.planner.hardware import Hardware

    facts = record["device"]
    capability = tuple(facts["capability"]) if facts["capability"] else None
    row = device_of_driver(facts["name"], facts["memory_bytes"])
    hardware = Hardware(
        facts["kind"], facts["name"], 1, facts["memory_bytes"], capability=capability, device=row, threads=1
    )
    return predicted(_plan(record["overrides"], hardware))


def faults(record: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return each number of a record that a prediction is too far from, in words."""
    texts = []
    for name, tolerance in TOLERANCES.items():
        guess, real = found[name], record["measured"][name]
        if guess is not None and real is not None and abs(guess / real - 1) > tolerance:
            off = f"predicted {guess:.5g}, measured {real:.5g} ({guess / real - 1:+.1%})"
            texts.append(f"{record['name']}: {name}: {off}")
    return texts


def predicted(plan: Any) -> dict[str, Any]:
    """Return what a plan is predicted to hold and take, at the table's rates and at those measured on this machine."""
    import dataclasses

    from bigtrain.memory.predict import predict
    from bigtrain.planner.choice import Choice
    from bigtrain.planner.speed import Speed

    hardware, row = plan.hardware, plan.hardware.device
    report = predict(
        plan.recipe,
        plan.model,
        device=hardware.kind,
        slow_bf16=hardware.slow_bf16,
        workspace_bytes=row.workspace_bytes if row else 0,
    )
    choice = Choice.of(plan.recipe, plan.model.num_hidden_layers, 1)
    of_table = dataclasses.replace(hardware, name=row.name if row else "no such device")
    names = ("allocated_bytes_peak", "reserved_bytes_peak", "device_bytes_peak")
    return {
        **{name: getattr(report, name, None) for name in names},
        "by_cause": dict(report.by_cause),
        "seconds_per_step": Speed(plan.recipe, plan.model, of_table, 1).seconds(choice).total,
        "seconds_per_step_at_measured_rates": Speed(plan.recipe, plan.model, hardware, 1).seconds(choice).total,
    }


def _peaks(kind: str, before: int | None) -> dict[str, int | None]:
    """Return the bytes of the second step: the allocator's peaks, and what the driver gave to this process."""
    if kind != "cuda":
        return {"allocated_bytes_peak": None, "reserved_bytes_peak": None, "device_bytes_peak": None}
    import torch

    after = _device_bytes(kind)
    assert before is not None and after is not None
    return {
        "allocated_bytes_peak": torch.cuda.max_memory_allocated(),
        "reserved_bytes_peak": torch.cuda.max_memory_reserved(),
        "device_bytes_peak": after,
        "device_bytes_before": before,
    }


def _device_bytes(kind: str) -> int | None:
    """Return how much of the device's memory is taken, by whomever."""
    if kind != "cuda":
        return None
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def _reset_peak(kind: str) -> None:
    if kind == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _batch(plan: Any) -> dict[str, Any]:
    """Return full rows of one document each: tokens drawn evenly, labels at as many places as the objective has."""
    import torch

    recipe, generator = plan.recipe, torch.Generator().manual_seed(1)
    rows, length = recipe.train.global_batch_size, recipe.data.sequence_length
    labels = ids = torch.randint(5, plan.model.vocab_size, (rows, length), generator=generator)
    if recipe.train.objective == "mlm":
        labels = torch.full_like(ids, -100)
        count = max(1, round(recipe.train.masking_probability * length))
        for row in range(rows):
            places = torch.randperm(length, generator=generator)[:count]
            labels[row, places] = ids[row, places]
    lengths = torch.tensor([[length]] * rows, dtype=torch.int32)
    return {"input_ids": ids, "labels": labels, "document_lengths": lengths}


def _plan(keys: list[str], hardware: Any) -> Any:
    """Plan without a budget: it is `MOST_OF_DEVICE` that leaves out what is larger, and a prediction that grows must be
    compared rather than refused."""
    import bigtrain

    return bigtrain.plan(_recipe(keys, hardware), hardware, bounded=False)


def _recipe(keys: list[str], hardware: Any) -> Any:
    """Return a recipe: that of a path which stands first, or a quickstart's, with the keys."""
    import bigtrain

    if keys[0].endswith(".yaml"):
        return bigtrain.load_recipe(REPOSITORY / keys[0], [*keys[1:], f"train.device={hardware.kind}"])
    base = RECIPES / ("quickstart_bert.yaml" if "model.family=bert" in keys else "quickstart_gpt.yaml")
    return bigtrain.load_recipe(base, [*keys, f"train.device={hardware.kind}"])


def _fits(case: Case, hardware: Any) -> bool:
    """Tell whether a configuration is for this device: its precision and policies are there, and so is the memory."""
    import bigtrain
    from bigtrain.memory.predict import predict

    recipe = _recipe(case[1], hardware)  # outside: a configuration that no device could run is a mistake
    try:
        plan = bigtrain.plan(recipe, hardware, bounded=False)
    except (bigtrain.RecipeError, bigtrain.DoesNotFit):
        return False
    report = predict(plan.recipe, plan.model, device=hardware.kind, slow_bf16=hardware.slow_bf16)
    needed = report.reserved_bytes_peak or report.allocated_bytes_peak
    return bool(needed <= MOST_OF_DEVICE * hardware.memory_bytes)


def in_process(keys: list[str], device: str, seconds: float) -> dict[str, Any]:
    """Measure one configuration in a process of its own; what goes wrong there is the result."""
    from bigtrain.launcher import worker_environment

    argv = [sys.executable, __file__, "--device", device, "--case", json.dumps(keys)]
    environment = {**os.environ, **worker_environment(device)}
    try:
        ran = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {seconds:.0f} s"}
    if ran.returncode:
        return {"error": ran.stderr.strip()[-2000:]}
    found: dict[str, Any] = json.loads(ran.stdout.rpartition("RESULT ")[2])
    return found


def _line(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"failed: {(found['error'].splitlines() or [''])[-1][:160]}"
    guess, real = found["predicted"], found["measured"]
    texts = []
    for name in ("allocated_bytes_peak", "reserved_bytes_peak", "seconds_per_step"):
        if guess[name] and real[name]:
            texts.append(f"{name} {real[name]:.4g} ({guess[name] / real[name] - 1:+.1%})")
    return ", ".join(texts)


def _is_measured(path: Path) -> bool:
    return path.is_file() and "error" not in json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, found: dict[str, Any]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def _hardware(device: str) -> Any:
    from bigtrain.planner.hardware import cpu, cuda_devices

    found = cpu() if device == "cpu" else cuda_devices()
    if found is None or not _torch_sees(device):
        why = "the driver shows none" if found is None else "the driver shows one that torch does not see"
        print(f"error: no CUDA device: {why}; --device cpu tries the script", file=sys.stderr)
        raise SystemExit(2)
    return found


def _torch_sees(device: str) -> bool:
    import torch

    return device == "cpu" or torch.cuda.is_available()


def _table_name(hardware: Any) -> str | None:
    return str(hardware.device.name) if hardware.device else None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure training steps on a device beside their prediction.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, help=f"the folder of the files (default: {FOLDER}/DEVICE)")
    parser.add_argument("--seconds", type=float, default=RUN_SECONDS, help="start no configuration after this long")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--name", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
