"""The Indexed Job: valid by Kubernetes' own schemas, retried or ended by exit code, its pods found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import job_files
import kubernetes_validate
import pytest
import yaml

from bigtrain.config.load import read_recipe
from bigtrain.rendering.job import Command
from bigtrain.rendering.kubernetes import PORT, kubernetes_file

CASES = [case for case in job_files.CASES if case.startswith("kubernetes")]
VERSIONS = ("1.33", kubernetes_validate.latest_version())


def documents(case: str) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(job_files.printed(case))}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_document_is_valid(case: str, version: str) -> None:
    for document in documents(case).values():
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize(
    ("kind", "path"),
    [("Job", ("spec", "completion")), ("Job", ("spec", "template", "spec", "imagee")), ("Service", ("spec", "x"))],
)
def test_the_schemas_notice_what_they_do_not_know(kind: str, path: tuple[str, ...]) -> None:
    document = documents("kubernetes_many.yaml")[kind]
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)


def test_one_pod_for_each_machine() -> None:
    spec = documents("kubernetes_many.yaml")["Job"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["activeDeadlineSeconds"] == 36 * 3600
    assert "successPolicy" not in spec


def test_pods_meet_at_the_first_one_by_its_name() -> None:
    found = documents("kubernetes_many.yaml")
    service, job = found["Service"], found["Job"]
    name = job["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    recipe = read_recipe(found["ConfigMap"]["data"]["recipe.yaml"].encode(), "mounted")
    assert recipe.cluster.rendezvous == f"{name}-0.{pod['subdomain']}:{PORT}"
    assert service["spec"]["ports"][0]["port"] == PORT


def test_alone_a_pod_meets_nobody() -> None:
    found = documents("kubernetes_one.yaml")
    assert set(found) == {"ConfigMap", "Job"}
    assert "subdomain" not in found["Job"]["spec"]["template"]["spec"]
    recipe = read_recipe(found["ConfigMap"]["data"]["recipe.yaml"].encode(), "mounted")
    assert recipe.cluster.rendezvous is None


@pytest.mark.parametrize("case", CASES)
def test_exit_codes(case: str) -> None:
    spec = documents(case)["Job"]["spec"]
    pod = spec["template"]["spec"]
    by_code = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["operator"] == "In"
            assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
            by_code |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
    assert by_code == {2: "FailJob", 3: "FailJob", 75: "Ignore"}
    assert pod["restartPolicy"] == "Never"  # which a failure policy, and retries by index, ask for
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["backoffLimitPerIndex"] > 0
    assert spec["maxFailedIndexes"] == 0


def test_an_elastic_job_is_done_with_its_first_pod() -> None:
    found = documents("kubernetes_elastic.yaml")
    spec = found["Job"]["spec"]
    assert (spec["completions"], spec["parallelism"]) == (4, 4)
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    recipe = read_recipe(found["ConfigMap"]["data"]["recipe.yaml"].encode(), "mounted")
    assert recipe.cluster.nodes == "2:4"


def test_gpus_are_asked_for_where_there_are_to_be_some() -> None:
    def container(case: str) -> dict[str, Any]:
        return documents(case)["Job"]["spec"]["template"]["spec"]["containers"][0]

    assert container("kubernetes_many.yaml")["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert "resources" not in container("kubernetes_one.yaml")


def test_the_recipe_says_what_was_overridden() -> None:
    found = documents("kubernetes_many.yaml")
    recipe = read_recipe(found["ConfigMap"]["data"]["recipe.yaml"].encode(), "mounted")
    assert recipe.train.device == "cuda"
    assert (recipe.cluster.nodes, recipe.cluster.devices_per_node, recipe.cluster.scheduler) == (2, 2, "local")
    assert recipe.model == job_files.recipe().model


def test_an_odd_run_folder_stays_one_word() -> None:
    job = job_files.job("kubernetes", *job_files.CASES["kubernetes_one.yaml"][1])
    text = kubernetes_file(job, Command("quickstart_gpt", (), Path('runs/a "b": {c} \u00e9\n#d')))
    (found,) = [document for document in yaml.safe_load_all(text) if document["kind"] == "Job"]
    kubernetes_validate.validate(found, VERSIONS[0], strict=True)
    assert found["spec"]["template"]["spec"]["containers"][0]["command"][-1].endswith('/runs/a "b": {c} \u00e9\n#d')
