"""scripts/measure_gpu.sh without a GPU: what it starts is a stub that notes what it is asked and ends as it is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
WORKS = ["bert-large-512", "bert-large-128", "gpt2-124m", "gpt2-xl", "llama-7b"]
PARTS = ["tests", "ours-bert-large-512", "memory", *(f"ours-{work}" for work in WORKS[1:]), "bert-large-512-documents",
         "bert-large-512-best", *WORKS[:3], "profile-bert", "profile-gpt", "device", *WORKS[3:]]  # fmt: skip
MORE, KILLED = 75, 124

STUB = r"""#!/usr/bin/env bash
# A file named after a part holds how its next calls end: a line each, an exit code and seconds; 0 without one.
here=$(dirname "$0")
case "$*" in
    *"measure_device.py --name"*) [ -f "$here/no-device" ] && echo "error: no CUDA device" >&2 && exit 2
        echo stub-device && exit ;;
    -c*) [ -f "$here/lacks" ] && for module in "$@"; do grep -xe "$module" "$here/lacks"; done; exit 0 ;;
    *"-m pytest"*) part=tests ;;
    *--work*) part=$* && part=${part#*/speed/} && part=${part%%.jsonl*} ;;
    *bench_memory.py*) part=memory ;;
    *measure_device.py*) part=device ;;
    *"profile bert_large"*) part=profile-bert ;;
    *"profile gpt2_124m"*) part=profile-gpt ;;
    *) part=unknown ;;
esac
echo "$part: $*" >>"$here/asked"
read -r code seconds 2>/dev/null <"$here/$part"
[ -f "$here/$part" ] && sed -i 1d "$here/$part"
[ "${seconds:-0}" = 0 ] || sleep "$seconds"
echo "$part said so"
exit "${code:-0}"
"""


class Machine:
    """A stub in place of Python, and a folder of results."""

    def __init__(self, folder: Path) -> None:
        self.stub, self.out, self.code = folder / "stub", folder / "results", "thiscode"
        self.stub.mkdir()
        python = self.stub / "python"
        python.write_text(STUB)
        python.chmod(0o755)

    def will(self, part: str, *ends: str) -> None:
        """Say how the next calls of a part end."""
        (self.stub / part).write_text("".join(f"{end}\n" for end in ends))

    def measure(self, *arguments: str) -> tuple[int, list[str], dict[str, str]]:
        """Run the script; return its exit code, the parts that were asked for, and the summary by part."""
        asked = self.stub / "asked"
        asked.unlink(missing_ok=True)
        environment = {**os.environ, "PYTHON": str(self.stub / "python"), "OUT": str(self.out), "SOURCES": self.code}
        argv = ["bash", str(REPOSITORY / "scripts" / "measure_gpu.sh"), *arguments]
        ran = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=100)
        self.printed, self.errors = ran.stdout, ran.stderr
        lines = asked.read_text().splitlines() if asked.is_file() else []
        self.commands = dict(line.split(": ", 1) for line in lines)
        table = (self.out / "summary.txt").read_text().splitlines()[1:-1] if self.out.is_dir() else []
        return ran.returncode, [line.partition(":")[0] for line in lines], {row.split()[0]: row for row in table}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def states(table: dict[str, str]) -> dict[str, str]:
    return {part: row.split()[1] for part, row in table.items()}


def test_all_is_measured_once_the_most_telling_first(machine: Machine) -> None:
    code, asked, table = machine.measure()
    assert (code, asked) == (0, PARTS)
    assert states(table) == dict.fromkeys(PARTS, "done")
    assert machine.measure()[:2] == (0, [])
    assert "stub-device, commit" in machine.printed


def test_one_that_was_cut_goes_on_and_one_that_failed_is_tried_again_last(machine: Machine) -> None:
    machine.will("tests", "1")
    machine.will("bert-large-512", f"{MORE}")
    machine.will("gpt2-xl", f"{KILLED}")
    code, asked, table = machine.measure()
    assert (code, asked) == (MORE, PARTS)
    assert states(table) == dict.fromkeys(PARTS, "done") | {
        "tests": "failed", "bert-large-512": "cut", "gpt2-xl": "cut"
    }  # fmt: skip
    assert "tests.log: tests said so" in table["tests"]
    machine.will("bert-large-512", "0")
    code, asked, table = machine.measure()
    assert (code, asked) == (0, ["bert-large-512", "gpt2-xl", "tests"])
    assert set(states(table).values()) == {"done"}


def test_only_failures_left_end_with_1(machine: Machine) -> None:
    machine.will("memory", "3", "3")
    assert machine.measure()[:2] == (1, PARTS)
    code, asked, table = machine.measure()
    assert (code, asked) == (1, ["memory"])
    assert table["memory"].split()[:3] == ["memory", "failed", "3"]


def test_what_takes_too_long_is_ended_and_nothing_begins_that_has_no_time(machine: Machine) -> None:
    machine.will("memory", "0 100")
    code, asked, table = machine.measure("--seconds", "7", "--least", "3", "memory", "device", "llama-7b")
    assert (code, asked) == (MORE, ["memory"])
    assert states(table) == {"memory": "cut", "device": "missing", "llama-7b": "missing"}
    assert table["memory"].split()[2] == f"{KILLED}"
    assert 3 <= int(table["memory"].split()[3]) <= 10
    assert machine.measure("--seconds", "30", "memory")[:2] == (MORE, [])  # it has a least time of its own
    assert machine.measure("memory")[:2] == (0, ["memory"])


def test_a_part_that_was_cut_goes_on_in_the_same_call_while_there_is_time(machine: Machine) -> None:
    machine.will("device", f"{MORE} 2", f"{MORE} 2", "0")
    code, asked, _ = machine.measure("--seconds", "30", "--least", "1", "device", "memory")
    assert (code, asked) == (0, ["memory", "device", "device", "device"])


def test_what_other_code_has_measured_is_put_aside_and_measured_again(machine: Machine) -> None:
    machine.code = "othercode"
    machine.measure("memory", "device")
    (machine.out / "memory" / "rows.json").write_text("{}")
    (machine.out / "a.json").write_text("{}")
    machine.code = ""  # that of the sources
    assert machine.measure("--any-code", "memory")[:2] == (0, [])
    assert "measured with other code" in machine.measure("--list")[2]["memory"]
    assert machine.measure("memory", "device")[:2] == (0, ["memory", "device"])
    aside = machine.out / "earlier" / "othercode"
    assert {file.name for file in aside.iterdir()} == {"rows.json", "a.json", "memory.log", "device.log"}
    assert not (machine.out / "a.json").exists()


def test_a_library_that_is_not_there_is_named_and_stops_nothing_else(machine: Machine) -> None:
    (machine.stub / "lacks").write_text("pytest\n")
    code, asked, table = machine.measure("tests", "memory")
    assert (code, asked) == (1, ["memory"])
    assert "lacks pytest" in table["tests"]


def test_what_is_asked_of_the_parts(machine: Machine) -> None:
    machine.measure("--seconds", "100", "--least", "5")
    assert 60 < int(machine.commands["device"].split()[-1]) <= 98
    tests = machine.commands["tests"].split()
    assert "tests/test_on_devices.py" in tests and "tests/test_same_run.py" in tests
    assert all((REPOSITORY / name).is_file() for name in tests if name.endswith(".py"))
    assert " --work llama-7b --rounds 3 " in machine.commands["llama-7b"]
    assert machine.commands["llama-7b"].endswith(" --arms bigtrain hf hf-compile plain hf-deepspeed")
    assert machine.commands["ours-llama-7b"].endswith(" --arms bigtrain")
    assert " -o timeout=120 --continue-on-collection-errors " in machine.commands["tests"]
    assert "tests/test_steps_on_devices.py" in tests
    assert len(set(names := [name for name in tests if name.endswith(".py")])) == len(names)
    documents = machine.commands["bert-large-512-documents"]
    assert documents.endswith(" --arms bigtrain hf plain --mode documents --mean-length 256")
    assert machine.commands["bert-large-512-best"].endswith(" --rounds 1 --steps 15 --timeout 400 --output "
        f"{machine.out}/speed/bert-large-512-best.jsonl --arms bigtrain --micro-batch best")  # fmt: skip
    assert f" --time --json --html {machine.out}/profile/profile-bert.html " in machine.commands["profile-bert"]
    assert (machine.out / "profile" / "profile-bert.json").read_text() == "profile-bert said so\n"


def test_the_options_of_the_parts_are_those_of_the_script(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    import bench_against

    machine.measure("bert-large-512-documents", "bert-large-512-best", "--seconds", "1000")
    for part, said in (
        ("documents", (["bigtrain", "hf", "plain"], "documents", 256, "equal")),
        ("best", (["bigtrain"], None, None, "best")),
    ):
        monkeypatch.setattr(sys, "argv", machine.commands[f"bert-large-512-{part}"].split())
        found = bench_against._options()
        assert (found.arms, found.mode, found.mean_length, found.micro_batch) == said


def test_a_profile_that_was_cut_leaves_no_torn_file(machine: Machine) -> None:
    machine.will("profile-bert", f"{KILLED}")
    assert machine.measure("profile-bert")[0] == MORE
    assert not (machine.out / "profile" / "profile-bert.json").exists()


def test_all_results_are_in_one_file_after_each_part_and_unpacked_elsewhere(machine: Machine, tmp_path: Path) -> None:
    pack = tmp_path / "m.tar.gz"
    machine.will("device", f"0 1; tar -tzf {pack} >{tmp_path}/meanwhile")
    stub = machine.stub / "python"
    stub.write_text(STUB.replace('sleep "$seconds"', 'eval "sleep $seconds"'))
    assert machine.measure("memory", "device", "--pack", str(pack))[:2] == (0, ["memory", "device"])
    assert "./parts/memory" in (tmp_path / "meanwhile").read_text().splitlines()
    assert sorted(file.name for file in tmp_path.glob("m.*")) == ["m.tar.gz"]
    machine.out = tmp_path / "elsewhere"
    assert machine.measure("memory", "device", "--pack", str(pack))[:2] == (0, [])
    assert machine.measure("memory", "device", "profile-gpt", "--pack", str(pack))[:2] == (0, ["profile-gpt"])
    assert machine.measure("memory", "--pack", str(tmp_path / "absent" / "m.tar.gz"))[:2] == (0, [])
    assert "m.tar.gz: could not be written" in machine.errors


def test_python3_where_there_is_no_python(tmp_path: Path) -> None:
    for name in (
        "dirname",
        "find",
        "sort",
        "tr",
        "xargs",
        "sha256sum",
        "cut",
        "git",
        "grep",
        "ls",
        "mkdir",
        "tail",
        "tee",
    ):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho stub-device\n")
    python.chmod(0o755)
    environment = {"PATH": str(tmp_path), "OUT": str(tmp_path / "out")}
    argv = [str(shutil.which("bash")), str(REPOSITORY / "scripts" / "measure_gpu.sh"), "--list"]
    ran = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=100)
    assert ran.returncode == MORE and "\nstub-device, commit " in ran.stdout


def test_results_say_of_which_sources_they_are(machine: Machine) -> None:
    stub = machine.stub / "python"
    stub.write_text(STUB.replace('echo "$part said so"', 'echo "$part: $SOURCES $COMMIT"'))
    machine.measure("memory")
    said = (machine.out / "logs" / "memory.log").read_text().split()
    assert said[:2] == ["memory:", "thiscode"] and len(said[2]) >= 7


def test_without_a_device_nothing_is_measured(machine: Machine) -> None:
    (machine.stub / "no-device").touch()
    assert machine.measure() == (2, [], {})
    assert machine.errors == "error: no CUDA device\n"


@pytest.mark.parametrize("argument", ["--second", "memry"])
def test_what_it_does_not_know_is_refused(machine: Machine, argument: str) -> None:
    code, asked, _ = machine.measure(argument)
    assert (code, asked) == (2, [])
    assert machine.errors.startswith(f"error: command line: {argument}: ")


def test_tests_that_passed_are_left_out_the_next_time(tmp_path: Path) -> None:
    """What is killed goes on where it was: a list of what passed, a line as soon as it has."""
    (tmp_path / "test_some.py").write_text(
        "import os\ndef test_a(): pass\ndef test_b(): assert 'WELL' in os.environ\n"
        "def test_c():\n    if 'WELL' not in os.environ: os._exit(9)\ndef test_d(): pass\n"
    )
    passed, found = tmp_path / "passed", []
    python = str(REPOSITORY / "tests" / "shared")
    for well in ({}, {"WELL": "1"}, {"WELL": "1"}):
        argv = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": python, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **well}
        argv += [
            "-p",
            "passed_before",
            "-p",
            "no:cacheprovider",
            "--passed-before",
            str(passed),
            str(tmp_path / "test_some.py"),
        ]
        ran = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=100)
        found.append((ran.returncode, [line.rpartition("_")[2] for line in passed.read_text().splitlines()]))
    assert found == [(9, ["a"]), (0, ["a", "b", "c", "d"]), (0, ["a", "b", "c", "d"])]
