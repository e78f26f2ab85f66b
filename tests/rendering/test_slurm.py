"""The batch file, run by stand-ins for Slurm's commands that act as two machines."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import job_files
import pytest

from bigtrain.rendering.job import Command
from bigtrain.rendering.slurm import LEAST_PORT, PORTS, slurm_file, slurm_time

CASES = [case for case in job_files.CASES if case.startswith("slurm")]

SBATCH_OPTIONS = {
    "exclusive", "gpus-per-node", "job-name", "mem", "no-kill", "nodes", "ntasks-per-node", "open-mode", "output",
    "partition", "requeue", "signal", "time",
}  # fmt: skip
"""Of sbatch(1), those that the files use."""

# Starts the command once on each machine, as srun does for one task a node, and returns the highest exit code.
SRUN = """#!/usr/bin/env bash
options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
echo "${options[@]}" >> "$STATE/srun"
highest=0
for node in ${NODES}; do
    SLURMD_NODENAME=$node "$@" || { code=$?; (( code > highest )) && highest=$code; }
done
exit "$highest"
"""

SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) [ "$2 $3" = "hostnames $SLURM_JOB_NODELIST" ] && printf '%s\\n' ${NODES} ;;
    requeue) echo "$2" >> "$STATE/requeued" ;;
    *) exit 1 ;;
esac
"""

# Runs the file, and once more for each time that it put itself back into the queue.
SBATCH = """#!/usr/bin/env bash
export SLURM_JOB_ID=31234567 SLURM_JOB_NODELIST='node[01-02]'
while :; do
    before=$(cat "$STATE/requeued" 2>/dev/null | wc -l)
    bash "$1"
    code=$?
    [ "$(cat "$STATE/requeued" 2>/dev/null | wc -l)" -gt "$before" ] || exit "$code"
done
"""

# In place of Python: notes what it is told, and ends with the next of the exit codes that were laid out for its node.
PYTHON = """#!/usr/bin/env bash
printf '%s\\0' "$SLURMD_NODENAME" "$PWD" "$@" >> "$STATE/launched"
printf '\\n\\0' >> "$STATE/launched"
codes=$STATE/codes.$SLURMD_NODENAME
code=$(head -n 1 "$codes")
sed -i 1d "$codes"
exit "$code"
"""


class Cluster:
    """Two machines, their launchers' exit codes laid out one start after the other."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.state, self.home = folder / "bin", folder / "state", folder / "my runs"
        for made in (self.bin, self.state, self.home):
            made.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "python": PYTHON}.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def submit(self, text: str, codes: dict[str, list[int]]) -> int:
        """Run a batch file to its end and return the job's exit code."""
        for node, laid_out in codes.items():
            (self.state / f"codes.{node}").write_text("".join(f"{code}\n" for code in laid_out))
        file = self.state / "job.sh"
        file.write_text(text)
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "STATE": str(self.state), "NODES": " ".join(codes)}
        done = subprocess.run(["sbatch", file], env=environment, capture_output=True, text=True, check=False)
        assert not done.stderr
        return done.returncode

    def launched(self) -> list[tuple[str, str, list[str]]]:
        """Return, for each start, the machine, the folder and the words after the interpreter."""
        starts = (self.state / "launched").read_text().split("\n\0")[:-1]
        parts = [start.rstrip("\0").split("\0") for start in starts]
        return [(node, folder, words) for node, folder, *words in parts]

    def requeued(self) -> list[str]:
        file = self.state / "requeued"
        return file.read_text().split() if file.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.fixture
def file_of(cluster: Cluster) -> Callable[..., str]:
    def written(*overrides: str, **typed: Any) -> str:
        command = Command("quickstart_gpt", overrides, **typed)
        python = str(cluster.bin / "python")
        return slurm_file(job_files.job("slurm", *overrides), command, python=python, folder=str(cluster.home))

    return written


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize("case", CASES)
def test_bash_reads_it(case: str) -> None:
    text = job_files.printed(case)
    assert text.startswith("#!/usr/bin/env bash\n")
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("case", CASES)
def test_options_stand_before_the_first_command(case: str) -> None:
    """Where sbatch stops to read them."""
    lines = job_files.printed(case).splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last < first
    assert set(directives("\n".join(lines))) <= SBATCH_OPTIONS


def test_machines_and_devices() -> None:
    many, elastic, one = (
        directives(job_files.printed(case)) for case in ("slurm_many.sh", "slurm_elastic.sh", "slurm_one.sh")
    )
    assert (many["nodes"], many["gpus-per-node"], many["ntasks-per-node"]) == ("2", "2", "1")
    assert (many["partition"], many["time"]) == ("gpu", "1-12:00:00")
    assert elastic["nodes"] == "2-4"
    assert "no-kill" in elastic
    assert "no-kill" not in many
    assert not {"gpus-per-node", "partition", "time"} & set(one)
    assert all(found["signal"] == "USR1@120" and "requeue" in found for found in (many, elastic, one))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(60.0, "0-00:01:00"), (86_400.0, "1-00:00:00"), (90_061.4, "1-01:01:01")],
)
def test_times(seconds: float, text: str) -> None:
    assert slurm_time(seconds) == text


def test_the_same_command_runs_on_every_machine(cluster: Cluster, file_of: Callable[..., str]) -> None:
    odd = ("cluster.nodes=2", "data.cache=/a b/$HOME/'\"`x`")
    text = file_of(*odd, *job_files.GPUS, run_dir=Path("runs/it's"), allowed=("seed",))
    assert cluster.submit(text, {"node01": [0], "node02": [0]}) == 0
    (first, here, words), (second, there, same) = cluster.launched()
    assert [first, second] == ["node01", "node02"]
    assert here == there == str(cluster.home)
    rendezvous = f"cluster.rendezvous=node01:{LEAST_PORT + 31234567 % PORTS}"
    launch = ["-P", "-m", "bigtrain", "launch", "quickstart_gpt"]
    assert words == [*launch, *odd, *job_files.GPUS, rendezvous, "--run-dir", "runs/it's", "--allow", "seed"]
    assert same == words
    assert cluster.requeued() == []


def test_alone_it_meets_nobody(cluster: Cluster, file_of: Callable[..., str]) -> None:
    assert cluster.submit(file_of("train.device=cpu"), {"node01": [0]}) == 0
    ((_, _, words),) = cluster.launched()
    assert words[5:] == ["train.device=cpu", "--run-dir", "runs/quickstart_gpt"]


def test_stopped_after_a_checkpoint_it_goes_back_into_the_queue(cluster: Cluster, file_of: Callable[..., str]) -> None:
    text = file_of("cluster.nodes=2", *job_files.GPUS)
    assert cluster.submit(text, {"node01": [75, 75, 0], "node02": [75, 75, 0]}) == 0
    assert cluster.requeued() == ["31234567"] * 2
    starts = cluster.launched()
    assert len(starts) == 6
    assert len({shlex.join(words) for _, _, words in starts}) == 1


@pytest.mark.parametrize("codes", [(2, 2), (3, 3), (1, 0), (75, 137)])
def test_after_anything_else_it_ends(codes: tuple[int, int], cluster: Cluster, file_of: Callable[..., str]) -> None:
    text = file_of("cluster.nodes=2", *job_files.GPUS)
    assert cluster.submit(text, {"node01": [codes[0]], "node02": [codes[1]]}) == max(codes)
    assert cluster.requeued() == []


def test_no_launcher_ends_the_others(cluster: Cluster, file_of: Callable[..., str]) -> None:
    assert cluster.submit(file_of("cluster.nodes=2:4", *job_files.GPUS), {"node01": [0], "node02": [0]}) == 0
    assert set((cluster.state / "srun").read_text().split()) == {
        "--kill-on-bad-exit=0",
        "--cpu-bind=none",
        "--no-kill",
    }


def test_it_is_for_this_interpreter_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    text = slurm_file(job_files.job("slurm", "train.device=cpu"), Command("quickstart_gpt"))
    assert f"\ncd -- {shlex.quote(str(tmp_path))}\n" in text
    assert f"    {shlex.quote(sys.executable)} -P -m bigtrain launch quickstart_gpt " in text


def test_what_was_typed_is_in_a_comment_and_stays_there() -> None:
    overrides = ("train.device=cpu", "data.cache=a\n#SBATCH --nodes=100")
    text = slurm_file(job_files.job("slurm", "train.device=cpu"), Command("quickstart_gpt", overrides), folder="/x")
    assert "data.cache=a\\n#SBATCH --nodes=100" in text.replace("\n#     ", " ")
    assert directives(text.partition("set -euo")[0])["nodes"] == "1"
