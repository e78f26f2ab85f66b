"""The places of tasks that Slurm's srun has started, as torchrun would tell them. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from bigtrain.errors import InputError

LEAST_PORT, PORTS = 20_000, 10_000
"""Below the ports that Linux gives to outgoing connections (32768 to 60999, ip(7))."""

STEP = "SLURM_STEP_ID"
"""Set in a job step alone: the batch script itself is no task of one."""

NUMBERS = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID", STEP)


def places(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE and what else torchrun sets for a task of a step of several; nothing elsewhere.

    They meet on the first node, at a port that follows from the job and the step. Names: srun(1), output environment
    variables. Raises InputError where nodes have different numbers of tasks, or a node's are not neighbours.
    """
    if STEP not in environment or environment.get("SLURM_NTASKS", "1") == "1":
        return {}
    try:
        rank, size, local_rank, node, job, step = (int(environment[name]) for name in NUMBERS)
        local_size = _tasks_of_a_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        first = first_host(environment["SLURM_STEP_NODELIST"])
    except (KeyError, ValueError) as error:
        raise InputError(f"environment: Slurm's variables of a step are not whole: {error}; start with srun") from None
    if rank != node * local_size + local_rank:
        text = f"task {rank} is number {local_rank} on node {node}, {local_size} a node"
        raise InputError(f"environment: {text}; neighbours belong together: use srun --distribution=block")
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": first,
        "MASTER_PORT": str(LEAST_PORT + (job + step) % PORTS),
    }


def first_host(nodes: str) -> str:
    """Return the first host of a list as Slurm writes it: `node[001-004,7],gpu3` is node001 and others."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[\]])+", nodes)
    if first is None or (first.end() < len(nodes) and nodes[first.end()] != ","):
        raise ValueError(f"{nodes!r} is no list of hosts")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def _tasks_of_a_node(text: str) -> int:
    """Return N of `N(xM)`, or of `N` for one node; Slurm writes `N,K` where nodes have different numbers."""
    found = re.fullmatch(r"(\d+)(?:\(x\d+\))?", text)
    if found is None:
        raise ValueError(f"{text!r} tasks a node; start equally many on each")
    return int(found[1])
