"""What the files for Kubernetes have in common."""

from __future__ import annotations

from pathlib import Path

import job_files
import pytest
import yaml

from bigtrain.config.load import read_recipe
from bigtrain.errors import InputError
from bigtrain.rendering.job import Command
from bigtrain.rendering.pods import KEPT, MOUNTS, config_map, kept_folder, launch_words, volumes, words

KEYS = ("train.device=cpu", *job_files.POD_KEYS)


def command(run_dir: str | None = None, allowed: tuple[str, ...] = ()) -> Command:
    return Command("quickstart_gpt", KEYS, None if run_dir is None else Path(run_dir), allowed)


@pytest.mark.parametrize(
    ("typed", "folder"),
    [
        (None, f"{KEPT}/runs/quickstart_gpt"),
        ("runs/other", f"{KEPT}/runs/other"),
        (f"{KEPT}/x", f"{KEPT}/x"),
    ],
)
def test_run_folders_are_on_the_volume(typed: str | None, folder: str) -> None:
    assert str(kept_folder(command(typed), job_files.recipe())) == folder


@pytest.mark.parametrize("typed", ["/home/me/runs", "../runs", f"{KEPT}/../x"])
def test_a_run_folder_elsewhere_is_refused(typed: str) -> None:
    with pytest.raises(InputError, match="command line: --run-dir: .*: not on the volume; write a folder below"):
        kept_folder(command(typed), job_files.recipe())


def test_the_recipe_arrives_whole() -> None:
    recipe = job_files.recipe(*KEYS, 'data.cache="/a: b # \\"c\\" | \\u00e9"', "train.tokens=3B")
    document = yaml.safe_load(config_map("quickstart-gpt", recipe))
    assert read_recipe(document["data"]["recipe.yaml"].encode(), "mounted") == recipe


def test_the_command_reads_the_recipe_where_it_is_mounted() -> None:
    job = job_files.job("kubernetes", *KEYS)
    said = launch_words(job, command("runs/x", ("seed",)), "cluster.timeout=5min")
    mounts = {mount["name"]: mount["mountPath"] for mount in yaml.safe_load(MOUNTS)}
    assert said[:4] == ["bigtrain", "launch", f"{mounts['recipe']}/recipe.yaml", "cluster.timeout=5min"]
    assert said[4:] == ["--run-dir", f"{mounts['kept']}/runs/x", "--allow", "seed"]


def test_what_was_typed_is_no_variable_of_kubernetes() -> None:
    job = job_files.job("kubernetes", *KEYS)
    assert f"{KEPT}/runs/$$(HOME)" in launch_words(job, command("runs/$(HOME)"))


def test_every_mount_has_a_volume() -> None:
    listed = yaml.safe_load(volumes("quickstart-gpt", job_files.recipe(*KEYS)))
    assert {volume["name"] for volume in listed} == {mount["name"] for mount in yaml.safe_load(MOUNTS)}
    assert {"claimName": "runs"} in [volume.get("persistentVolumeClaim") for volume in listed]
    assert {"name": "quickstart-gpt"} in [volume.get("configMap") for volume in listed]


def test_words_are_texts_whatever_they_look_like() -> None:
    values = ["yes", "1e3", "a: b", "", "null", '"', "- x"]
    assert yaml.safe_load(words(values)) == values
