"""A TrainJob for Kubeflow Trainer, on its runtime `torch-distributed`, which makes the pods and their Service."""

from __future__ import annotations

from bigtrain.rendering.job import SAVING_SECONDS, Command, Job
from bigtrain.rendering.lines import block, comments, scalar
from bigtrain.rendering.names import object_name
from bigtrain.rendering.pods import KEPT, MOUNTS, config_map, launch_words, volumes, words

MET = "cluster.rendezvous=$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"
"""What the runtime's torch policy tells each container, and Kubernetes writes into its command."""


def trainjob_file(job: Job, command: Command) -> str:
    """Return documents for `kubectl apply`: a ConfigMap with the recipe and a TrainJob.

    Needs Kubeflow Trainer 2.3, from which on a TrainJob says how long its pods have to save. Not torchrun but a
    launcher of ours runs on each node: its exit code tells why a run ended. The runtime's Job starts a pod that fails
    again, whatever its exit code, as often as its `backoffLimit` says: 6 times unless the runtime has another.
    """
    name = object_name(job.recipe.name)
    head = [
        f"{job.recipe.name} on Kubeflow Trainer: {job.shape}. Printed by: {command} --render trainjob",
        f"Start: kubectl apply -f FILE. Watch: kubectl logs -f -l "
        f"jobset.sigs.k8s.io/jobset-name={name},batch.kubernetes.io/job-completion-index=0",
        f"Once more: kubectl delete trainjob {name}, then start it; it goes on from its newest checkpoint.",
        job.note,
    ]
    documents = [config_map(name, job.recipe), _trainjob(job, command, name)]
    return "\n".join(comments(*head)) + "\n" + "---\n".join(documents)


def _trainjob(job: Job, command: Command, name: str) -> str:
    assert job.recipe.cluster.image is not None
    limit = job.recipe.cluster.time_limit
    deadline = "" if limit is None else f"  activeDeadlineSeconds: {max(1, round(limit))}\n"
    resources = f"    resourcesPerNode:\n      limits: {{nvidia.com/gpu: {job.devices}}}\n" if job.cuda else ""
    met = [] if job.alone else [MET]
    return f"""\
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {name}
  labels: {{app.kubernetes.io/name: bigtrain}}
spec:
  runtimeRef: {{apiGroup: trainer.kubeflow.org, kind: ClusterTrainingRuntime, name: torch-distributed}}
{deadline}\
  trainer:
    image: {scalar(job.recipe.cluster.image)}
    numNodes: {job.most}
    command:
{block(words(["env", f"--chdir={KEPT}", *launch_words(job, command, *met)]), 6)}
    env:
      - {{name: BIGTRAIN_CACHE, value: {KEPT}/cache}}
{resources}\
  runtimePatches:
    - manager: bigtrain
      trainingRuntimeSpec:
        template:
          spec:
            replicatedJobs:
              - name: node
                template:
                  spec:
                    template:
                      spec:
                        terminationGracePeriodSeconds: {SAVING_SECONDS}
                        containers:
                          - name: node
                            volumeMounts:
{block(MOUNTS, 30)}
                        volumes:
{block(volumes(name, job.recipe), 26)}
"""
