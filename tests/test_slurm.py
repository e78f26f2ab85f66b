"""Places of Slurm's tasks: names of hosts as Slurm writes them, and what torchrun would have set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.errors import InputError
from bigtrain.slurm import LEAST_PORT, PORTS, first_host, places

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_a_task_of_a_step_has_the_place_that_torchrun_would_give_it() -> None:
    assert places(STEP) == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(LEAST_PORT + 1234569 % PORTS),
    }


@pytest.mark.parametrize("missing", ["SLURM_STEP_ID"])
def test_a_batch_script_and_what_is_outside_of_slurm_are_no_tasks(missing: str) -> None:
    assert places({key: value for key, value in STEP.items() if key != missing}) == {}
    assert places({}) == {}


def test_one_task_alone_is_no_rank() -> None:
    one = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert places({**STEP, **one}) == {}
    assert places({key: value for key, value in STEP.items() if key != "SLURM_NTASKS"}) == {}


def test_tasks_on_one_node() -> None:
    one = {"SLURM_STEP_TASKS_PER_NODE": "16", "SLURM_NODEID": "0", "SLURM_LOCALID": "9"}
    assert places({**STEP, **one})["LOCAL_WORLD_SIZE"] == "16"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "8,4"}, r"'8,4' tasks a node; start equally many on each"),
        ({"SLURM_LOCALID": "x"}, r"invalid literal.*'x'; start with srun"),
        ({"SLURM_LOCALID": "4"}, r"task 9 is number 4 on node 1, 8 a node; .*--distribution=block"),
        ({"SLURM_STEP_NODELIST": ""}, r"'' is no list of hosts"),
    ],
)
def test_what_cannot_be_is_said(changes: dict[str, str], text: str) -> None:
    with pytest.raises(InputError, match=f"^environment: .*{text}"):
        places({**STEP, **changes})


def test_a_variable_that_is_missing_is_named() -> None:
    with pytest.raises(InputError, match=r"not whole: 'SLURM_STEP_NODELIST'; start with srun"):
        places({key: value for key, value in STEP.items() if key != "SLURM_STEP_NODELIST"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[001-004,7],gpu3", "node001"),
        ("node[7,9-12]", "node7"),
        ("rack[2-3]n[05-08]", "rack2n05"),
        ("n[1-2]-ib.cluster,login", "n1-ib.cluster"),
        ("a-1,b[1-2]", "a-1"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",", "[", "node[1-2", "a]b"])
def test_what_is_no_list_of_hosts(nodes: str) -> None:
    with pytest.raises(ValueError, match="no list of hosts"):
        first_host(nodes)


@given(st.integers(0, 999), st.integers(1, 9), st.sampled_from(["", "-ib", ".example"]), st.booleans())
def test_a_range_of_any_width_begins_with_its_first_number(start: int, more: int, suffix: str, another: bool) -> None:
    nodes = f"gpu[{start:04}-{start + more:04}]{suffix}" + (",cpu[1-3]" if another else "")
    assert first_host(nodes) == f"gpu{start:04}{suffix}"


@given(st.integers(1, 64), st.integers(1, 8), st.data())
def test_ranks_are_neighbours_on_their_nodes(nodes: int, tasks: int, data: st.DataObject) -> None:
    node, local = data.draw(st.integers(0, nodes - 1)), data.draw(st.integers(0, tasks - 1))
    written = {"SLURM_PROCID": node * tasks + local, "SLURM_NTASKS": nodes * tasks, "SLURM_LOCALID": local}
    found = places({**STEP, **{k: str(v) for k, v in written.items()}, "SLURM_NODEID": str(node)} | {
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x{nodes})" if nodes > 1 else str(tasks)
    })  # fmt: skip
    if nodes * tasks == 1:
        assert found == {}
    else:
        assert int(found["RANK"]) == node * int(found["LOCAL_WORLD_SIZE"]) + int(found["LOCAL_RANK"])
