"""What a run folder holds before a save that is disturbed, and how it must be after it."""

from __future__ import annotations

from pathlib import Path

from tiny_state import TEXTS, holds, save, saver_in, state_after, store_in

from bigtrain.checkpoint.manifest import folder_name
from bigtrain.checkpoint.state import TrainState

NEW = 4
"""The step that is being saved; before it there are checkpoints of earlier ones."""


def before_fresh(folder: Path) -> None:
    folder.mkdir(parents=True)


def before_plain(folder: Path) -> None:
    save(folder, NEW - 1)


def before_debris(folder: Path) -> None:
    """Leave what dead saves leave, and a folder of the new step that does not verify."""
    save(folder, NEW - 1)
    for name in (f".tmp-{NEW}-0123abcd", f".tmp-{NEW - 1}-89efcdab"):
        (folder / name).mkdir()
        (folder / name / "weights.safetensors").write_bytes(b"half of one")
    (folder / folder_name(NEW)).mkdir()
    (folder / folder_name(NEW) / "manifest.json").write_text("{}")


def before_retention(folder: Path) -> None:
    for steps in range(1, NEW):
        save(folder, steps, keep=9)


SCENES = {
    "fresh": (before_fresh, False),
    "plain": (before_plain, False),
    "debris": (before_debris, False),
    "retention": (before_retention, False),
    "asynchronous": (before_plain, True),
    "asynchronous retention": (before_retention, True),
}
"""What is there before, and whether the save makes a copy and goes on."""


def save_new(folder: Path, state: TrainState, *, copies: bool) -> None:
    """Save in a run's way; what is copied changes while it is written, as training changes it."""
    saver = saver_in(folder, keep=2, copies=copies)
    state.save(saver, TEXTS)
    if copies:
        for parameter in state.engine.parameters.values():
            parameter.data.zero_()
    saver.finish()


def survived(folder: Path, scene: str, next_state: TrainState, *, new: bool | None = None) -> bool:
    """Tell whether the newest checkpoint is of the new step or the one before, and the next save works by itself.

    `new` says which of them, if that is known.
    """
    newest = store_in(folder).newest()
    before = None if scene == "fresh" else folder / folder_name(NEW - 1)
    if newest not in (before, folder / folder_name(NEW)):
        return False
    is_new = newest == folder / folder_name(NEW)
    if is_new != new and new is not None:
        return False
    if newest is not None and not holds(newest, state_after(NEW if is_new else NEW - 1)):
        return False
    saver = saver_in(folder, keep=2)
    next_state.save(saver, TEXTS)
    saver.require(NEW + 1)
    return holds(folder / folder_name(NEW + 1), next_state) and not list(folder.glob(".tmp-*"))
