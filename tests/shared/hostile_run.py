"""Read every hostile file in turn and print what came of it, a line of JSON each; the folder is the argument.

Of each: the error's type and lines, the seconds and the resident bytes that reading took beyond those before, and the
events of Python's audit hooks that no reading of a file should cause.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import hostile_files
from hostile_data import CANARY, RECIPE, Case

from bigtrain.config.load import load_recipe
from bigtrain.data.build import prepare
from bigtrain.errors import BigtrainError

FORBIDDEN = (
    "pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty",
    "socket.connect", "socket.bind", "ctypes.dlopen", "os.putenv",
)  # fmt: skip

seen: list[str] = []


def watch(event: str, details: tuple[Any, ...]) -> None:
    if event in FORBIDDEN:
        seen.append(f"{event} {details!r:.200}")
    if event in ("exec", "compile") and CANARY in repr(details):
        seen.append(f"{event} of a file's content")


def status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{key}:")[2].split()[0]) * 1024


def tried(case: Case, folder: Path) -> dict[str, Any]:
    case.make(folder)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew
    seen.clear()
    before, begun = status("VmRSS"), time.process_time()  # of this process alone: others may use the machine
    try:
        case.read(folder)
        kind, exit_code, text = "", 0, ""
    except BigtrainError as error:
        kind, exit_code, text = type(error).__name__, error.exit_code, str(error)
    except BaseException as error:
        kind, exit_code, text = f"unforeseen {type(error).__name__}", 1, str(error)[:500]
    return {
        "kind": kind,
        "exit_code": exit_code,
        "lines": text.splitlines(),
        "seconds": time.process_time() - begun,
        "bytes": status("VmHWM") - before,
        "events": [*seen, *([CANARY] if Path(CANARY).exists() else [])],
        "passed_over": case.passed_over,
    }


def main() -> None:
    folder = Path(sys.argv[1])
    os.chdir(folder)
    source = folder / "sound.jsonl"
    texts = ("red green blue stone river tree bird sings falls grows "[: 50 - n % 30] for n in range(400))
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "sound.yaml").write_text(RECIPE.replace("SOURCE", str(source)))
    corpus = prepare(load_recipe(folder / "sound.yaml", [f"data.cache={folder / 'cache'}"]), False)
    chosen = sys.argv[2:]
    sys.addaudithook(watch)
    for name, case in hostile_files.cases(source, corpus).items():
        if chosen and not any(word in name for word in chosen):
            continue
        own = folder / "case"
        own.mkdir()
        print(json.dumps({"name": name, **tried(case, own)}), flush=True)
        shutil.rmtree(own)


if __name__ == "__main__":
    main()
