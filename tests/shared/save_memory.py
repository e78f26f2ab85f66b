"""How much more host memory a save takes, streaming or with a copy: `save_memory.py FOLDER`, lines of JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from ranks_apart import cut_engine, step
from tiny_state import TEXTS, Place, bits, store_in
from torch import nn

from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.state import TrainState
from bigtrain.optim import AdamW
from bigtrain.world import ALONE

WIDTH = 2048


def resident(name: str) -> int:
    """Return a line of /proc/self/status in bytes: VmRSS now, VmHWM at most since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def forget() -> None:
    """Let VmHWM begin anew (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    engine = cut_engine(nn.Linear(WIDTH, WIDTH), lambda held: AdamW(held, lr=0.1), ALONE)
    step(engine, 1)
    state = TrainState(engine, Place(1), tokens=1)  # type: ignore[arg-type]
    for copies in (False, True):
        saver = Saver(store_in(folder / str(copies)), ALONE, copies=copies)
        forget()
        before = resident("VmRSS")
        state.save(saver, TEXTS)
        saver.require(1)
        more = resident("VmHWM") - before
        print(json.dumps({"copies": copies, "more": more, "state": sum(tensor.nbytes for tensor in bits(state))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
