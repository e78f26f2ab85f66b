"""Rows C2, C7, P1, P2, P3, P6 and P8 of the fault matrix: processes that are killed, hang, or are told to stop."""

from __future__ import annotations

import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from launched import Launched, Life, Line, losses, weights_digest
from matrix import Counts, counted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

PHASES = ("data", "forward", "backward", "update", "save", "evaluate")

NOTICED_SECONDS, OUT_SECONDS, AGAIN_SECONDS = 1.0, 5.0, 10.0
"""A killed worker is noticed, all others are out, and steps are taken again: within so long after it was killed."""

SIGNAL_SECONDS, HANG_SECONDS = 25.0, 2.0

EACH_STEP = ("checkpoint.every_steps=1", "train.eval_every=2")


def killing(cases: Sequence[tuple[str, int]], folder: Path) -> tuple[str, list[Path]]:
    """Return the faults that kill a rank in a phase, one each three steps, and the files that tell when."""
    files = [folder / f"killed-{number}" for number in range(len(cases))]
    faults = [
        f"{phase}:kill:rank={rank}:step={4 + 2 * number}:once={file}"
        for number, ((phase, rank), file) in enumerate(zip(cases, files, strict=True))
    ]
    return " ".join(faults), files


def kill_from_outside(launched: Launched, rng: random.Random, kills: int, seconds: float) -> list[float]:
    """Kill a worker at a random moment of so many attempts, once each has taken steps and saved; return when."""
    times = []
    for _ in range(kills):
        since = times[-1] if times else 0.0
        launched.wait_for(lambda since=since: len(launched.steps_after(since)) > 2)  # type: ignore[misc]
        time.sleep(rng.uniform(0, seconds))
        times.append(time.time())
        launched.signal_workers(signal.SIGKILL, rng.randrange(len(launched.workers)))
        launched.wait_for(lambda at=times[-1]: restarted(launched, at))  # type: ignore[misc]
    return times


def restarted(launched: Launched, at: float) -> bool:
    return any(line.at > at and "starting again" in line.text for line in list(launched.lines))


def check_restart(
    launched: Launched, attempt: Sequence[Life], at: float, counts: Counts, what: str, most: Sequence[float]
) -> None:
    """Count one kill: noticed, survivors out, stepping again, each in its time."""
    gone = [life.gone for life in attempt if life.gone is not None]
    steps = launched.steps_after(max(gone))
    found = (min(gone) - at, max(gone) - at, steps[0].at - at if steps else 999.0)
    names = ("seconds until noticed", "seconds until the others are out", "seconds until the next step")
    within = [counts.within(name, seconds, limit) for name, seconds, limit in zip(names, found, most, strict=True)]
    counts.add(steps and all(within), f"{what}: {found}")


def limits(launched: Launched) -> tuple[float, float, float]:
    """Return the promised bounds; on a busy machine stepping again takes as long as it took to start."""
    first = launched.steps_after(0.0)[0].at - launched.begun
    return NOTICED_SECONDS, OUT_SECONDS, max(AGAIN_SECONDS, 1.5 * first)


def undisturbed(recipe: Path, run: Path, *overrides: str) -> list[tuple[int, float]]:
    launched = Launched(recipe, run, *overrides)
    assert launched.wait() == 0, launched.output
    return losses(run)


def killed_in_phases(recipe: Path, folder: Path, world: int, cases: Sequence[tuple[str, int]], tier: str) -> Launched:
    """Kill ranks in phases of one run, and hold its losses against those of a run left alone; row C2."""
    keys = (*EACH_STEP, f"cluster.devices_per_node={world}", f"train.steps={2 * len(cases) + 8}")
    whole = undisturbed(recipe, folder / "whole", *keys)
    faults, files = killing(cases, folder)
    launched = Launched(recipe, folder / "cut", *keys, faults=faults)
    code = launched.wait(1500)
    with counted("C2", tier, f"world-{world}") as counts:
        same = code == 0 and losses(folder / "cut") == whole
        counts.figures["bitwise the same losses"] = same
        attempts = launched.attempts(world)
        for number, ((phase, rank), file) in enumerate(zip(cases, files, strict=True)):
            what = f"world {world}, rank {rank} in {phase}"
            if same and file.exists() and number < len(attempts):
                most = (OUT_SECONDS, OUT_SECONDS, 900.0)
                check_restart(launched, attempts[number], file.stat().st_mtime, counts, what, most)
            else:
                counts.add(passed=False, what=f"{what}: exit {code}: {launched.output[-1500:]}")
    return launched


def small(recipe: Path) -> Path:
    """Return a recipe of two micro-batches a rank for worlds of 2, one for those of 4."""
    text = recipe.read_text().replace("micro_batch_size: 4", "micro_batch_size: 2")
    recipe.write_text(text)
    return recipe


def test_killed_in_any_phase_a_run_of_two_goes_on(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    cases = [("data", 0), ("forward", 1), ("backward", 0), ("update", 1), ("save", 0), ("publish", 0)]
    killed_in_phases(small(tiny_recipes["gpt"]), tmp_path, 2, cases, "ci")


def test_killed_in_any_phase_a_run_of_four_goes_on(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    killed_in_phases(small(tiny_recipes["bert"]), tmp_path, 4, [("evaluate", 3), ("backward", 2)], "ci")


@pytest.mark.nightly
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("world", [2, 4])
def test_each_rank_is_killed_in_each_phase(tiny_recipes: dict[str, Path], tmp_path: Path, world: int) -> None:
    cases = [(phase, rank) for phase in PHASES for rank in range(world)]
    killed_in_phases(small(tiny_recipes["gpt"]), tmp_path, world, cases, "nightly")


@pytest.mark.parametrize("kills", [pytest.param(4, id="ci"), pytest.param(20, id="all", marks=pytest.mark.nightly)])
@pytest.mark.timeout(2400)
def test_workers_that_are_killed_are_started_again(tiny_recipes: dict[str, Path], tmp_path: Path, kills: int) -> None:
    keys = (*EACH_STEP, "cluster.devices_per_node=2", "train.steps=100000")
    launched = Launched(small(tiny_recipes["gpt"]), tmp_path / "run", *keys)
    times = kill_from_outside(launched, random.Random(kills), kills, 0.5)
    launched.wait_for(lambda: launched.steps_after(times[-1]))
    launched.kill()
    launched.wait()
    with counted("P1", "ci" if kills < 20 else "nightly") as counts:
        for attempt, at in zip(launched.attempts(2), times, strict=False):
            check_restart(launched, attempt, at, counts, "SIGKILL", limits(launched))
        counts.add(launched.ended and not any(life.gone is None for life in launched.lives), "workers are left")


def test_hangs_are_found_and_the_culprit_named(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    cases = {
        "stopped": ("forward:stop:rank=1", "rank 1", "forward of step 4, stopped by a signal"),
        "stuck loader": ("data:hang:rank=1", "rank 1", "data of step 4, idle"),
        "stuck collective": ("backward:hang:rank=0", "rank 0", "backward of step 4, idle"),
    }
    seconds = 5.0
    keys = ("cluster.devices_per_node=2", f"cluster.timeout={seconds:g}s")
    with counted("P2", "ci") as counts:
        for name, (fault, rank, where) in cases.items():
            run, once = tmp_path / name.replace(" ", "-"), tmp_path / f"{name}-done".replace(" ", "-")
            launched = Launched(small(tiny_recipes["gpt"]), run, *keys, faults=f"{fault}:step=3:once={once}")
            code = launched.wait()
            late = launched.ended - once.stat().st_mtime - seconds
            soon = counts.within("seconds after the timeout", late, HANG_SECONDS)
            (error,) = [line.text for line in launched.lines if line.text.startswith("error: rank ")]
            (stacks,) = run.glob("stacks-*.txt")
            text = stacks.read_text()
            named = error.startswith(f"error: {rank} on ") and where in error and str(stacks) in error
            shown = "rank 0" in text and "rank 1" in text and "_take_step" in text
            counts.add(code == 1 and named and shown and soon, f"{name}: {code}, {late}, {error}")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.nightly),
        pytest.param(signal.SIGUSR1, id="SIGUSR1", marks=pytest.mark.nightly),
    ],
)
def test_signals_save_and_end(tiny_recipes: dict[str, Path], tmp_path: Path, number: signal.Signals) -> None:
    run, keys = tmp_path / "run", ("cluster.devices_per_node=2", "train.steps=100000", "checkpoint.every_steps=1000")
    recipe = small(tiny_recipes["gpt"])

    def started(faults: str = "") -> Launched:
        launched = Launched(recipe, run, *keys, faults=faults)
        launched.wait_for(lambda: len(launched.steps_after(0)) > 2)
        return launched

    def told(launched: Launched, to: str) -> None:
        if to != "one rank":
            launched.process.send_signal(number)
        if to != "the launcher":
            launched.signal_workers(number, 1 if to == "one rank" else None)

    with counted("P3", "ci" if number == signal.SIGTERM else "nightly", number.name) as counts:
        for to in ("the launcher", "one rank", "all"):
            launched, at = started(), time.time()
            told(launched, to)
            code = launched.wait()
            in_time = counts.within("seconds until out", launched.ended - at, SIGNAL_SECONDS)
            newest = int(max(run.glob("step-*")).name.removeprefix("step-"))
            saved = f"{number.name}: saved step {newest};" in launched.output
            counts.add(code == 75 and saved and in_time, f"{to}: {code}: {launched.output[-800:]}")
        launched = started("save:slow=60")
        told(launched, "the launcher")
        time.sleep(3)
        at = time.time()
        told(launched, "the launcher")
        code = launched.wait()
        soon = counts.within("seconds until out after a second signal", launched.ended - at, 5.0)
        said = "the newest checkpoint is of step" in launched.output
        counts.add(code == 75 and said and soon, f"twice: {code}: {launched.output[-800:]}")


def test_a_signal_before_there_are_workers_ends_the_launch(
    tiny_recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))  # so that there is data to prepare
    launched = Launched(tiny_recipes["gpt"], tmp_path / "run")
    launched.wait_for(lambda: "tokenizer" in launched.output)
    launched.process.send_signal(signal.SIGUSR1)
    code = launched.wait()
    with counted("P3", "ci", "early") as counts:
        said = "error: SIGUSR1: ended before a checkpoint; launch again to start" in launched.output
        counts.add(code == 1 and said, f"{code}: {launched.output}")


def test_a_crash_loop_stops(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    keys = ("checkpoint.every_steps=1000", "train.eval_every=null")
    launched = Launched(tiny_recipes["gpt"], tmp_path / "run", *keys, faults="update:kill:step=2")
    code = launched.wait()
    with counted("P6", "ci") as counts:
        stopped = code == 1 and "3 restarts brought no new checkpoint" in launched.output
        counts.add(stopped and len(launched.lives) == 4, f"{code}, {len(launched.lives)}: {launched.output}")


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_a_hundred_random_kills_change_no_weight(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    keys = ("cluster.devices_per_node=2", "train.steps=1500", "train.eval_every=null", "checkpoint.every_steps=3")
    recipe, rng, kills, launches = small(tiny_recipes["gpt"]), random.Random(7), 0, 0
    whole = undisturbed(recipe, tmp_path / "whole", *keys)
    launched = Launched(recipe, tmp_path / "cut", *keys)
    while kills < 100:
        if launched.process.poll() is not None:  # three in a row before a new checkpoint: the run asks for a person
            assert launched.wait() == 1, launched.output
            launched = Launched(recipe, tmp_path / "cut", *keys)
            launches += 1
        killed_before = max((life.gone or 0 for life in launched.lives), default=0)
        if kills % 4:  # else also while it starts
            while not launched.steps_after(killed_before) and launched.process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.4))
        else:
            time.sleep(rng.uniform(0, 4))
        if launched.workers and launched.process.poll() is None:
            launched.signal_workers(signal.SIGKILL, rng.randrange(len(launched.workers)))
            kills += 1
            time.sleep(0.3)
    code = launched.wait(900)
    if code == 1:
        launches += 1
        launched = Launched(recipe, tmp_path / "cut", *keys)
        code = launched.wait(900)
    with counted("C7", "nightly") as counts:
        counts.figures |= {"kills": kills, "launches after crash loops": launches, "steps": len(whole)}
        same = weights_digest(tmp_path / "cut") == weights_digest(tmp_path / "whole")
        same = same and code == 0 and losses(tmp_path / "cut") == whole
        counts.add(same, f"exit {code}")


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_most_time_is_productive_with_a_kill_every_two_minutes(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    keys = ("cluster.devices_per_node=2", "train.steps=1000000", "train.eval_every=null", "checkpoint.every_steps=10")
    launched = Launched(small(tiny_recipes["gpt"]), tmp_path / "run", *keys, faults="forward:slow=0.1")
    launched.wait_for(lambda: launched.steps_after(0))
    begun, rng = launched.steps_after(0)[0].at, random.Random(8)
    for number in range(1, 10):
        while time.time() < begun + 120 * number:
            time.sleep(0.1)
        launched.signal_workers(signal.SIGKILL, rng.randrange(2))
    while time.time() < begun + 1200:
        time.sleep(0.1)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait() == 75, launched.output[-2000:]
    share = productive_share(launched.steps_after(0), begun + 1200)
    with counted("P8", "nightly") as counts:
        counts.figures |= {"kills": 9, "share of the time productive": round(share, 4)}
        counts.add(share >= 0.9, f"{share:.3f}")


def productive_share(steps: Sequence[Line], end: float) -> float:
    """Return the share of the time from the first step on that was spent on steps that were not taken again."""
    numbers = [int(line.text.split()[1].partition("/")[0]) for line in steps]
    spent = {}
    for line, number, before, number_before in zip(steps[1:], numbers[1:], steps, numbers, strict=False):
        if number == number_before + 1:
            spent[number] = line.at - before.at  # of one that is taken again the last time counts
    usual = statistics.median(spent.values())
    return sum(min(seconds, 20 * usual) for seconds in spent.values()) / (end - steps[0].at)
