"""Two hosts, as far as one machine can have them: network namespaces joined by a cable, a launcher in each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from matrix import counted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ADDRESSES = ("198.18.77.1", "198.18.77.2")
"""Of the range for tests between networks (RFC 2544)."""

PLACE = f"{ADDRESSES[0]}:29400"

NOTICED_SECONDS = 3 * 3 + 5 + 3
"""Beats that are missing, the last call, the grace of processes: after so long those that are left start again."""


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


class Host:
    """A network namespace, and the launchers in it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.launchers: list[subprocess.Popen[str]] = []

    def launch(self, recipe: Path, run: Path, *overrides: str) -> subprocess.Popen[str]:
        argv = ["ip", "netns", "exec", self.name, sys.executable, "-m", "bigtrain", "launch", str(recipe), *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen(
            [*argv, "--run-dir", str(run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.launchers.append(launcher)
        return launcher

    def processes(self) -> list[int]:
        return [int(word) for word in ip("netns", "pids", self.name).split()]

    def cut_off(self) -> None:
        """Let nothing in or out of it."""
        ends = [line.split(":")[1].strip().partition("@")[0] for line in ip("-n", self.name, "-o", "link").splitlines()]
        for end in ends:
            ip("-n", self.name, "link", "set", end, "down")

    def end(self) -> None:
        """End everything in it at once, as when the power fails, except that its connections are closed."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def clear(self) -> None:
        self.end()
        for launcher in self.launchers:
            if launcher.stdout is not None and not launcher.stdout.closed:
                launcher.communicate()


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Yield two hosts that reach each other, the first at PLACE; skip where namespaces are not allowed."""
    both = (Host(f"bigtrain-{os.getpid()}-a"), Host(f"bigtrain-{os.getpid()}-b"))
    names = [host.name for host in both]
    made = []
    try:
        try:
            for host in both:
                ip("netns", "add", host.name)
                made.append(host)
            ends = [f"bt{os.getpid() % 10**6}{letter}" for letter in "ab"]
            ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
            for name, end, address in zip(names, ends, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/30", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
        yield both
    finally:
        for host in made:
            host.clear()
            ip("netns", "delete", host.name)


@pytest.fixture
def slow_recipe(tmp_path: Path, corpus_file: Path) -> Path:
    """Return a recipe of many small micro-batches a step, so that a run is still under way when a node comes."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {{family: gpt, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}}\n"
        f"data: {{source: {corpus_file}, vocab_size: 300, sequence_length: 32, validation_fraction: 0.1}}\n"
        f"train: {{objective: clm, global_batch_size: 32, micro_batch_size: 1, steps: 100000, eval_every: null,\n"
        f"        dropout: 0, device: cpu}}\n"
        f"optimizer: {{learning_rate: 1e-3, schedule: constant, warmup_steps: 10}}\n"
        f"sharding: {{zero_stage: 3}}\n"
        f"checkpoint: {{every_steps: 10}}\n"
        f"logging: {{every_steps: 1, trackers: []}}\n"
    )
    return path


def losses(run: Path) -> list[tuple[int, float]]:
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def steps(run: Path) -> int:
    found = losses(run)
    return found[-1][0] if found else 0


def wait_until(what: Callable[[], bool], seconds: float, launchers: list[subprocess.Popen[str]]) -> float:
    """Return how many seconds it took."""
    start = time.monotonic()
    while not what():
        if time.monotonic() - start > seconds or all(launcher.poll() is not None for launcher in launchers):
            for launcher in launchers:
                launcher.kill()
            pytest.fail("\n----\n".join(launcher.communicate()[0][-2000:] for launcher in launchers))
        time.sleep(0.05)
    return time.monotonic() - start


def newest_checkpoint(run: Path) -> int:
    return max((int(folder.name.removeprefix("step-")) for folder in run.glob("step-*")), default=0)


def started_again(run: Path) -> Callable[[], bool]:
    """Return what tells whether the run has been started again since now, and has taken a step from its checkpoint."""
    written, step = (run / "env.json").stat().st_mtime_ns, newest_checkpoint(run)
    return lambda: (run / "env.json").stat().st_mtime_ns != written and steps(run) > step


def same_as_alone(host: Host, recipe: Path, run: Path, alone: Path) -> None:
    """Hold a run against one of a single process: each step once, the same losses."""
    found = losses(run)
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    host.launch(recipe, alone, f"train.steps={len(found)}").communicate()
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in losses(alone)], rel=1e-5)


def test_a_run_survives_the_loss_of_a_host_and_takes_it_back(
    hosts: tuple[Host, Host], slow_recipe: Path, tmp_path: Path
) -> None:
    first, second = hosts
    run, keys = tmp_path / "run", ("cluster.nodes=1:2", f"cluster.rendezvous={PLACE}")
    one, other = (host.launch(slow_recipe, run, *keys) for host in hosts)
    starting = wait_until(lambda: steps(run) >= 1, 280, [one, other])
    wait_until(lambda: steps(run) >= 12, 120, [one, other])
    assert len(second.processes()) == 3  # launcher, agent, training process

    going_on = started_again(run)
    second.end()
    other.communicate()
    seconds = wait_until(going_on, 280, [one])
    most = max(30.0, NOTICED_SECONDS + starting)  # a busy machine takes as long again as it took to start

    together = started_again(run)
    other = second.launch(slow_recipe, run, *keys)
    back_seconds = wait_until(together, 280, [one, other])
    with counted("P7", "ci") as counts:
        counts.figures |= {"seconds to the first step": round(starting, 1)}
        counts.longest("seconds from the loss of a host to the next step", round(seconds, 1))
        counts.longest("seconds from its launch to the first step with it", round(back_seconds, 1))
        counts.add(seconds < most, f"{seconds:.1f} s without the host, {starting:.1f} s to start")
        counts.add(len(second.processes()) == 3, "the host that is back takes part")
    assert 'nodes: "1:2"' in (run / "plan.yaml").read_text()

    one.send_signal(signal.SIGTERM)
    outputs = [launcher.communicate()[0] for launcher in (one, other)]
    ends = {one.returncode, other.returncode}
    assert ends == {75}, "\n----\n".join(outputs)
    assert f"SIGTERM: saved step {newest_checkpoint(run)}; launch again to go on" in outputs[0]
    same_as_alone(first, slow_recipe, run, tmp_path / "alone")


def test_a_host_that_falls_silent_is_given_up(hosts: tuple[Host, Host], slow_recipe: Path, tmp_path: Path) -> None:
    """As when its power fails: its connections stay open, and nothing comes from them."""
    first, second = hosts
    run, keys = tmp_path / "run", ("cluster.nodes=1:2", f"cluster.rendezvous={PLACE}", "cluster.timeout=120s")
    one, other = (host.launch(slow_recipe, run, *keys) for host in hosts)
    starting = wait_until(lambda: steps(run) >= 1, 280, [one, other])
    wait_until(lambda: steps(run) >= 12, 120, [one, other])
    going_on = started_again(run)
    second.cut_off()
    seconds = wait_until(going_on, 280, [one])
    print(f"{starting:.1f} s to the first step, {seconds:.1f} s to the first after a host fell silent")
    assert seconds < NOTICED_SECONDS + starting
    one.send_signal(signal.SIGTERM)
    output = one.communicate()[0]
    second.end()
    other.communicate()
    assert one.returncode == 75, output
    same_as_alone(first, slow_recipe, run, tmp_path / "alone")
