"""The TrainJob: valid by the part of its schema that it uses, its volumes by Kubernetes' own."""

from __future__ import annotations

import re
from typing import Any

import job_files
import jsonschema
import kubernetes_validate
import pytest
import yaml

from bigtrain.config.load import read_recipe
from bigtrain.rendering.trainjob import MET

CASES = [case for case in job_files.CASES if case.startswith("trainjob")]
LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"


def closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has no other keys: the API server refuses what it does not know."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": list(required),
    }


def listed(item: dict[str, Any], most: int) -> dict[str, Any]:
    return {"type": "array", "items": item, "maxItems": most}


TEXT = {"type": "string"}
WORD = {"type": "string", "minLength": 1, "maxLength": 253}
COUNT = {"type": "integer", "minimum": 1}
OBJECT = {"type": "object"}

# Written after the Go types of Kubeflow Trainer 2.3.0 (kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go).
# Pods' own parts are left open here; the test below has them from Kubernetes.
POD = closed(
    terminationGracePeriodSeconds={"type": "integer", "minimum": 0},
    containers=listed(closed(("name",), name=WORD, volumeMounts=listed(OBJECT, 128)), 64),
    volumes=listed(OBJECT, 128),
)
REPLICATED = closed(("name",), name=WORD, template=closed(spec=closed(template=closed(spec=POD))))
PATCH = closed(
    ("manager",),
    manager=WORD,
    trainingRuntimeSpec=closed(template=closed(spec=closed(replicatedJobs=listed(REPLICATED, 100)))),
)
TRAINER = closed(
    image={"type": "string", "maxLength": 500},
    command=listed(TEXT, 128),
    env=listed(closed(("name",), name=TEXT, value=TEXT), 128),
    numNodes={"type": "integer", "minimum": 0},
    resourcesPerNode=closed(limits={"type": "object", "additionalProperties": {"type": ["integer", "string"]}}),
)
TRAINJOB = closed(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainJob"},
    metadata=closed(("name",), name={"type": "string", "pattern": LABEL, "maxLength": 63}, labels=OBJECT),
    spec=closed(
        ("runtimeRef",),
        runtimeRef=closed(("name",), name=WORD, apiGroup=WORD, kind=WORD),
        activeDeadlineSeconds=COUNT,
        trainer=TRAINER,
        runtimePatches=listed(PATCH, 16),
    ),
)

RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
"""What the runtime's torch policy sets and lets no TrainJob set (pkg/constants/constants.go)."""


def documents(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config, trainjob = yaml.safe_load_all(job_files.printed(case))
    return config, trainjob


def pod_patch(trainjob: dict[str, Any]) -> dict[str, Any]:
    (patch,) = trainjob["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert job["name"] == "node"  # of the runtime's job and of its container
    found: dict[str, Any] = job["template"]["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("case", CASES)
def test_it_is_valid(case: str) -> None:
    config, trainjob = documents(case)
    kubernetes_validate.validate(config, kubernetes_validate.latest_version(), strict=True)
    jsonschema.Draft202012Validator(TRAINJOB).validate(trainjob)


@pytest.mark.parametrize("key", ["nodes", "podTemplateOverrides", "numProcPerNode"])
def test_the_schema_is_closed(key: str) -> None:
    _, trainjob = documents(CASES[0])
    trainjob["spec"][key] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(TRAINJOB).validate(trainjob)


@pytest.mark.parametrize("case", CASES)
def test_its_pods_are_valid(case: str) -> None:
    """A pod of the runtime with the patch in it, and with the trainer's container."""
    _, trainjob = documents(case)
    patch, trainer = pod_patch(trainjob), trainjob["spec"]["trainer"]
    (container,) = patch["containers"]
    container |= {"image": trainer["image"], "command": trainer["command"], "env": trainer["env"]}
    container |= {"resources": trainer["resourcesPerNode"]} if "resourcesPerNode" in trainer else {}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": patch}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in patch["volumes"]}


def test_launchers_meet_where_the_runtime_says() -> None:
    trainer = documents("trainjob_many.yaml")[1]["spec"]["trainer"]
    assert trainer["numNodes"] == 2
    assert MET in trainer["command"]
    assert set(re.findall(r"\$\((\w+)\)", MET)) <= RESERVED
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 2}}


def test_alone_it_meets_nobody() -> None:
    trainer = documents("trainjob_one.yaml")[1]["spec"]["trainer"]
    assert trainer["numNodes"] == 1
    assert not any("rendezvous" in word for word in trainer["command"])
    assert "resourcesPerNode" not in trainer


@pytest.mark.parametrize("case", CASES)
def test_what_the_runtime_sets_is_left_to_it(case: str) -> None:
    trainer = documents(case)[1]["spec"]["trainer"]
    assert "numProcPerNode" not in trainer
    assert not RESERVED & {variable["name"] for variable in trainer["env"]}


def test_the_time_limit_is_the_jobs() -> None:
    assert documents("trainjob_many.yaml")[1]["spec"]["activeDeadlineSeconds"] == 36 * 3600
    assert "activeDeadlineSeconds" not in documents("trainjob_one.yaml")[1]["spec"]


def test_the_recipe_is_the_one_that_was_overridden() -> None:
    config, _ = documents("trainjob_many.yaml")
    recipe = read_recipe(config["data"]["recipe.yaml"].encode(), "mounted")
    assert (recipe.cluster.nodes, recipe.cluster.devices_per_node, recipe.train.device) == (2, 2, "cuda")
    assert recipe.cluster.rendezvous is None  # comes with the command
