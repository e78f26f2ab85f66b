"""A training process that trains nothing: what it does in each attempt of its rank stands in a file.

In FOLDER/script.json: a list by rank of what each attempt does: an exit code; "wait" for a signal, and end as a
training process does after one; "kill" itself; "save" a checkpoint, as far as its folder, and crash; "hang" after a
beat or "idle" after two. After the last one it ends with 0. Every attempt writes down its place.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from bigtrain import heartbeat

CODES = {signal.SIGTERM: 75, signal.SIGINT: 75, signal.SIGUSR1: 75, signal.SIGUSR2: 76}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "BIGTRAIN_LISTENER")


def main() -> int:
    for number in CODES:
        signal.signal(number, lambda got, _frame: sys.exit(CODES[signal.Signals(got)]))
    folder, text = Path(sys.argv[2]), sys.stdin.read()
    rank = int(os.environ["RANK"])
    done = folder / f"attempts-{rank}.jsonl"
    attempt = len(done.read_text().splitlines()) if done.is_file() else 0
    with done.open("a") as file:
        parent = int(sys.argv[1]) == os.getppid()
        place = {name: os.environ.get(name) for name in NAMES}
        file.write(json.dumps({"plan": text, "parent": parent, **place}) + "\n")
    script = json.loads((folder / "script.json").read_text())
    acts = script[rank] if rank < len(script) else []
    act = acts[attempt] if attempt < len(acts) else 0
    if act == "wait":
        time.sleep(60)
        return 9
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "save":
        (folder / f"step-{attempt + 1:08}").mkdir()
        return 70
    if act in ("hang", "idle"):
        heartbeat.begin(os.environ)
        for phase in ("data", "forward")[: 2 if act == "idle" else 1]:
            heartbeat.enter(phase, 5)
        time.sleep(60)
    return int(act)


if __name__ == "__main__":
    sys.exit(main())
