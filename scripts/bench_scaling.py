"""Time training steps on 1, 2 and 4 processes of this machine, every ZeRO stage: benchmarks/scaling_cpu.json.

    python scripts/bench_scaling.py                      on the CPU over gloo, one thread a process
    python scripts/bench_scaling.py --device cuda --output benchmarks/measured/DEVICE/scaling.json

Strong scaling shares the same rows out; weak scaling gives each process as many. All processes live from beginning to
end, and wait while others step: in each round every arm takes some steps, so that other work on the machine slows all
of them alike. Beside the time of a step stands its processor time, all processes together, which other work changes
little. Then the first of two processes traces steps at stage 3: in what share of the time of its collectives it
computes as well. More processes than cores share them, and the file says how many there are.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from overlap import crossed, length, spans
from provenance import provenance

ROOT = Path(__file__).parent.parent
WORLDS = (1, 2, 4)
ROWS, MICRO = 8, 2
"""Of a step in strong scaling, and of a micro-batch; in weak scaling two processes have the same."""
WARM_UP_STEPS = 2

RECIPE = "quickstart_gpt"
MODEL = ["model.hidden_size=192", "model.num_hidden_layers=4", "model.num_attention_heads=4", "data.vocab_size=4096",
         "data.sequence_length=128", f"train.micro_batch_size={MICRO}", "train.steps=100000", "train.compile=false",
         "recompute.policy=none", "amp.precision=fp32", "optimizer.state=fp32", "sharding.offload=none"]  # fmt: skip
"""2.6M parameters, 1.8M of them in 4 blocks."""


def arms(worlds: Sequence[int]) -> dict[str, tuple[int, list[str]]]:
    """Return processes and overrides of each arm, by name."""
    found = {}
    for world in worlds:
        layouts = {f"stage {stage}": (stage, world if stage == 0 else 1) for stage in (range(4) if world > 1 else (0,))}
        if world >= 4:
            layouts["stage 3 in groups of 2"] = (3, world // 2)
        for name, (stage, replicate) in layouts.items():
            for kind, rows in {"strong": ROWS, "weak": ROWS * world // 2}.items():
                keys = [f"sharding.zero_stage={stage}", f"sharding.replicate={replicate}"]
                keys += [f"train.global_batch_size={rows}", f"cluster.devices_per_node={world}"]
                if kind == "strong" or (rows != ROWS and name in ("stage 0", "stage 3")):
                    found[f"{kind}, {world} x, {name}"] = (world, keys)
    return found


class Group:
    """Processes of one world size, which wait until they are asked."""

    def __init__(self, world: int, device: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        common |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        argv = [sys.executable, __file__, "--worker", "--device", device]
        self._processes = [
            subprocess.Popen(
                argv,
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
            for rank in range(world)
        ]

    def ask(self, **command: Any) -> Any:
        """Let all processes do something and return what the first one found."""
        for process in self._processes:
            assert process.stdin is not None
            print(json.dumps(command), file=process.stdin, flush=True)
        assert self._processes[0].stdout is not None
        for line in self._processes[0].stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise SystemExit(f"{command}: the first process ended with exit code {self._processes[0].wait()}")

    def end(self) -> None:
        """Let the processes end."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait()


def main() -> int:
    """Run the rounds, write the file and print what each arm reaches."""
    options = _options()
    if options.worker:
        work(options.device)
        return 0
    chosen = arms(options.worlds)
    with groups(options.worlds, options.device) as group_of:
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        for number in range(options.rounds + 1):
            for name, (world, keys) in chosen.items():
                steps = options.steps if number else WARM_UP_STEPS
                found = group_of[world].ask(arm=name, keys=keys, steps=steps)
                if number:
                    rounds[name].append(found)
            print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)
        first = min(world for world in options.worlds if world > 1)
        name = f"strong, {first} x, stage 3"
        overlap = group_of[first].ask(arm=name, keys=chosen[name][1], steps=options.steps, trace=True)
    result = {**provenance(), **machine(options.device), "model": MODEL, "arms": summary(rounds), "overlap": overlap}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, found in result["arms"].items():
        print(f"{name:36} {found['tokens_per_second']:7.0f} tokens/s  {found['efficiency']:6.1%}", end="  ")
        print(f"processor time a token x {found['processor_ratio']:.2f}")
    print(json.dumps(overlap, indent=1))
    return 0


@contextmanager
def groups(worlds: Sequence[int], device: str) -> Iterator[dict[int, Group]]:
    """Start the processes of each world size, and end them."""
    with ExitStack() as held:
        found = {}
        for world in worlds:
            found[world] = Group(world, device)
            held.callback(found[world].end)
        yield found


def machine(device: str) -> dict[str, Any]:
    """Return what the numbers depend on: the device, the cores that may be used, what else ran."""
    from bigtrain.planner import hardware

    here = hardware.cpu() if device == "cpu" else hardware.cuda_devices()
    assert here is not None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": here.name, "cores": cores, "load_average": os.getloadavg()}


def summary(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return each arm's medians over rounds, of ratios to one process with those of each round.

    `efficiency` is the speed of each process, `processor_ratio` the processor time a token, as a share of the one
    process's. Two processes have the same rows in strong and in weak scaling.
    """
    found = {}
    both = {name.replace("strong", "weak"): rows for name, rows in rounds.items() if name.startswith("strong, 2 x")}
    for name, rows in {**rounds, **both}.items():
        kind, world = name.split(", ")[0], int(name.split(", ")[1].split()[0])
        alone = rounds[f"{kind}, 1 x, stage 0"]
        pairs = list(zip(rows, alone, strict=True))
        found[name] = {
            "tokens_per_second": statistics.median(row["tokens"] / row["seconds"] for row in rows),
            "seconds_per_step": statistics.median(row["seconds"] for row in rows),
            "processor_seconds_per_step": statistics.median(row["processor"] for row in rows),
            "efficiency": statistics.median(
                row["tokens"] / row["seconds"] / (one["tokens"] / one["seconds"]) / world for row, one in pairs
            ),
            "processor_ratio": statistics.median(
                row["processor"] / row["tokens"] / (one["processor"] / one["tokens"]) for row, one in pairs
            ),
            "rounds": rows,
        }
    return found


def work(device: str) -> None:
    """Be one of several processes: step as standard input says until it ends."""
    from bigtrain.world import joined

    kind = "cuda" if device == "cuda" else "cpu"
    steppers: dict[str, Callable[[], int]] = {}
    with joined(kind=kind, timeout_seconds=600) as world:
        for line in sys.stdin:
            command = json.loads(line)
            name = command["arm"]
            if name not in steppers:
                steppers[name] = stepper(command["keys"], device)
            if command.get("trace"):
                found = traced(steppers[name], command["steps"])
            else:
                found = timed(steppers[name], command["steps"])
                found["processor"] = world.sum([found["processor"]])[0]
            if world.first:
                print("RESULT " + json.dumps(found), flush=True)


def stepper(keys: Sequence[str], device: str) -> Callable[[], int]:
    """Return what takes a step as the shipped loop does, and returns the tokens of all ranks."""
    import bigtrain
    from bigtrain.data.ensure import ensure_prepared
    from bigtrain.planner import hardware
    from bigtrain.training.build import build_engine, build_loader
    from bigtrain.training.runtime import seed_step
    from bigtrain.world import current_world

    here = hardware.cpu() if device == "cpu" else hardware.cuda_devices()
    recipe = bigtrain.load_recipe(RECIPE, [*MODEL, f"train.device={device}", *keys])
    plan, world = bigtrain.plan(recipe, here), current_world()
    rows, engine = iter(build_loader(plan, ensure_prepared(recipe, aside=True), world)), build_engine(plan)

    def step() -> int:
        seed_step(recipe.seed, engine.steps_taken, world.rank)
        batch = next(rows)
        for micro in engine.micro_batches(batch):
            engine.backward(engine.model(**micro))
        float(engine.step(recipe.train.max_grad_norm).loss)
        return int(batch["input_ids"].numel()) * world.size

    return step


def timed(step: Callable[[], int], steps: int) -> dict[str, float]:
    """Return the median seconds of some steps, the tokens of one, and this process's processor time for one."""
    seconds, processor = [], time.process_time()
    for _ in range(steps):
        begin = time.perf_counter()
        tokens = step()
        seconds.append(time.perf_counter() - begin)
    spent = (time.process_time() - processor) / steps
    return {"seconds": statistics.median(seconds), "tokens": tokens, "processor": spent}


def traced(step: Callable[[], int], steps: int) -> dict[str, float]:
    """Return how long a step's collectives take in a trace, and in what share of that this process computes."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + torch.cuda.is_available()]) as seen:
        for _ in range(steps):
            step()
    sent, computed = spans(seen.events())
    seconds, both = length(sent) / steps, length(crossed(sent, computed)) / steps
    return {"sent_seconds": seconds, "computed_seconds": length(computed) / steps, "overlapped_share": both / seconds}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS), help="1 is needed, and one above")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each arm in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "scaling_cpu.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
