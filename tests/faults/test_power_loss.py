"""Row C3 of the fault matrix: the power is lost in a save, and of what was not synced anything may be missing."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from disk import watched
from matrix import counted
from power_loss import Recorder, make, tree
from published import NEW, SCENES, save_new, survived
from tiny_state import state_after

from bigtrain.checkpoint.manifest import folder_name

STATES = {"fresh": 110, "plain": 170, "debris": 110, "retention": 170}

CHANCES = (0.0, 0.3, 0.7, 1.0)
"""Of what was not synced to be there."""


def recorded(scene: str, folder: Path) -> Recorder:
    SCENES[scene][0](folder)
    recorder = Recorder(folder)
    with watched(folder, recorder):
        save_new(folder, state_after(NEW), copies=False)
    return recorder


@pytest.mark.slow
def test_c3_the_power_is_lost(quick_path: Path) -> None:
    luck, next_state = random.Random(3), state_after(NEW + 1)
    with counted("C3", "ci") as counts:
        for scene, wanted in STATES.items():
            recorder = recorded(scene, quick_path / scene)
            safe, seen = recorder.published(folder_name(NEW)), set()
            for number in range(100 * wanted):
                if len(seen) == wanted:
                    break
                done = number % (len(recorder.steps) + 1)
                disk = recorder.after_loss(done, luck.choice(CHANCES), luck)
                if (tree(disk), done >= safe) in seen:
                    continue
                seen.add((tree(disk), done >= safe))
                work = quick_path / "after"
                make(disk, work)
                good = survived(work, scene, next_state, new=True if done >= safe else None)
                counts.add(good, f"{scene}, after {done} of {len(recorder.steps)} steps, state {len(seen)}")
                shutil.rmtree(work)
            assert len(seen) == wanted


def test_what_was_not_synced_can_get_lost(quick_path: Path) -> None:
    """A save that syncs nothing would not pass: the states are as bad as they can be."""
    recorder = recorded("plain", quick_path / "run")
    recorder.steps = [step for step in recorder.steps if step.kind != "sync"]
    luck, next_state, bad = random.Random(3), state_after(NEW + 1), 0
    for number in range(20):
        disk = recorder.after_loss(len(recorder.steps), 0.5, luck)
        make(disk, quick_path / f"after {number}")
        bad += not survived(quick_path / f"after {number}", "plain", next_state, new=True)
    assert bad > 10
