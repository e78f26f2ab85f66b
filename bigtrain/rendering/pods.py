"""What the files for Kubernetes have in common: the recipe as a ConfigMap, volumes, the command."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from bigtrain.config.dump import to_yaml
from bigtrain.config.schema import Recipe
from bigtrain.errors import InputError
from bigtrain.rendering.job import Command, Job
from bigtrain.rendering.lines import block, scalar

KEPT = "/bigtrain"
"""Where the volume is in a container, and where commands run: run folders, tokenized data, and paths of a recipe."""

RECIPE_FOLDER = "/etc/bigtrain"


def kept_folder(command: Command, recipe: Recipe) -> PurePosixPath:
    """Return the run folder in the container. Raises InputError if it is not on the volume."""
    folder = PurePosixPath(KEPT, command.run_dir or Path("runs") / recipe.name)
    if ".." in folder.parts or not folder.is_relative_to(KEPT):
        raise InputError(f"command line: --run-dir: {command.run_dir}: not on the volume; write a folder below {KEPT}")
    return folder


def launch_words(job: Job, command: Command, *overrides: str) -> list[str]:
    """Return the command of a container; Kubernetes reads $(NAME) in it as a variable, so typed ones are escaped."""
    options = command.options(Path(kept_folder(command, job.recipe)))
    typed = [word.replace("$(", "$$(") for word in options]
    return ["bigtrain", "launch", f"{RECIPE_FOLDER}/recipe.yaml", *overrides, *typed]


def config_map(name: str, recipe: Recipe) -> str:
    """Return the document that carries the recipe, overrides put over it."""
    return f"""\
apiVersion: v1
kind: ConfigMap
metadata:
  name: {name}
  labels: {{app.kubernetes.io/name: bigtrain}}
data:
  recipe.yaml: |
{block(to_yaml(recipe), 4)}
"""


def volumes(name: str, recipe: Recipe) -> str:
    """Return the volumes of a pod: the recipe, the claim, and shared memory, of which containers have 64 MiB."""
    return f"""\
- name: recipe
  configMap: {{name: {name}}}
- name: kept
  persistentVolumeClaim: {{claimName: {recipe.cluster.volume}}}
- name: shm
  emptyDir: {{medium: Memory}}"""


MOUNTS = f"""\
- {{name: recipe, mountPath: {RECIPE_FOLDER}}}
- {{name: kept, mountPath: {KEPT}}}
- {{name: shm, mountPath: /dev/shm}}"""


def words(values: list[str]) -> str:
    """Return texts as the items of a YAML list."""
    return "\n".join(f"- {scalar(value)}" for value in values)
