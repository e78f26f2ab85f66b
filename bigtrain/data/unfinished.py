"""What is kept beside the finished parts of a corpus until all are there: another process goes on after them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bigtrain import strict_json
from bigtrain.data.batches import Batch
from bigtrain.data.cache import write_json, written_aside
from bigtrain.data.corpus import LARGEST_MANIFEST_BYTES, Corpus, are_files
from bigtrain.data.part import PartWriter, total_counts
from bigtrain.data.reading import START, mark_of
from bigtrain.data.seen import DIGEST, Seen
from bigtrain.data.selection import NOTHING_LEFT_OUT, is_left_out
from bigtrain.errors import DataError

STATE = "progress.json"

State: TypeAlias = dict[str, Any]
"""`parts`: the facts of each finished part; `mark`: where in the source they end; `left_out`: documents, by reason."""


def resumed(aside: Path) -> State:
    """Return the state of an interrupted run; of a new one also where a finished part is damaged."""
    fresh: State = {"mark": START, "parts": [], "left_out": NOTHING_LEFT_OUT}
    if not (aside / STATE).exists():
        return fresh
    try:
        state: State = strict_json.read(aside / STATE, LARGEST_MANIFEST_BYTES)
        files = files_of(state)
        whole = are_files(files) and is_left_out(state["left_out"])
        mark_of(state["mark"])
        total_counts(state["parts"])
        seen = {_seen_file(number): part["seen"] for number, part in enumerate(state["parts"]) if "seen" in part}
        Corpus(aside, {"files": {**files, **seen}}).verify()
    except (DataError, ValueError, KeyError, TypeError, AttributeError):
        return fresh
    return state if whole else fresh


def seen_before(aside: Path, state: State) -> Seen:
    """Return the digests of the documents in finished parts, where the recipe leaves duplicates out."""
    seen = Seen()
    for number, part in enumerate(state["parts"]):
        if "seen" in part:
            seen.add(np.fromfile(aside / _seen_file(number), DIGEST))
    return seen


def finish(part: PartWriter, batches: list[Batch], state: State, aside: Path) -> None:
    """Close a part, which holds these batches, and add it to the state, here and on the disk."""
    facts = part.close()
    if digests := b"".join(batch.digests for batch in batches):
        file = aside / _seen_file(len(state["parts"]))
        with written_aside(file) as stream:
            stream.write(digests)
        facts["seen"] = {"bytes": len(digests), "sha256": hashlib.sha256(digests).hexdigest()}
    state["parts"].append(facts)
    state["mark"] = batches[-1].mark
    for batch in batches:
        state["left_out"] = {why: count + batch.left_out[why] for why, count in state["left_out"].items()}
    write_json(aside / STATE, state)


def forget(aside: Path) -> None:
    """Remove what nobody needs once all parts are finished."""
    for left in (aside / STATE, *aside.glob("*.seen")):
        left.unlink(missing_ok=True)


def files_of(state: State) -> dict[str, Any]:
    """Return the files of the finished parts, each with its size and digest."""
    return {name: facts for part in state["parts"] for name, facts in part["files"].items()}


def _seen_file(number: int) -> str:
    return f"{number:05d}.seen"
