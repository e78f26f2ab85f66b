"""An Indexed Job for Kubernetes, with a headless Service by which its pods find each other, and the recipe."""

from __future__ import annotations

from bigtrain.config.schema import Recipe
from bigtrain.errors import DoesNotFit, InputError, Interrupted
from bigtrain.rendering.job import SAVING_SECONDS, Command, Job
from bigtrain.rendering.lines import block, comments, scalar
from bigtrain.rendering.names import object_name
from bigtrain.rendering.pods import KEPT, MOUNTS, config_map, launch_words, volumes, words

PORT = 29400
"""Where the launchers meet; a pod has its ports to itself."""

RETRIES = 3
"""How often a machine's launcher is started again after a fault; stopping after a checkpoint does not count."""


def kubernetes_file(job: Job, command: Command) -> str:
    """Return documents for `kubectl apply`: a ConfigMap, a Service, a Job with one pod for each machine.

    Needs Kubernetes 1.33, in which retries by index and the success policy are stable. A pod that stopped after a
    checkpoint is started again; wrong input and a run that does not fit end the job at once.
    """
    name = object_name(job.recipe.name)
    recipe = _met(job, name)
    head = [
        f"{job.recipe.name} on Kubernetes: {job.shape}. Printed by: {command} --render kubernetes",
        f"Start: kubectl apply -f FILE. Watch: kubectl logs -f -l "
        f"batch.kubernetes.io/job-name={name},batch.kubernetes.io/job-completion-index=0",
        f"Once more: kubectl delete job {name}, then start it; it goes on from its newest checkpoint.",
        job.note,
    ]
    documents = [config_map(name, recipe), *([] if job.alone else [_service(name)]), _job(job, command, name)]
    return "\n".join(comments(*head)) + "\n" + "---\n".join(documents)


def _met(job: Job, name: str) -> Recipe:
    """Return the recipe with the first pod as the place where all meet."""
    if job.alone:
        return job.recipe
    cluster = job.recipe.cluster.model_copy(update={"rendezvous": f"{name}-0.{name}:{PORT}"})
    return job.recipe.model_copy(update={"cluster": cluster})


def _service(name: str) -> str:
    return f"""\
apiVersion: v1
kind: Service
metadata:
  name: {name}
  labels: {{app.kubernetes.io/name: bigtrain}}
spec:
  clusterIP: None
  # Pods look each other up before they are ready.
  publishNotReadyAddresses: true
  selector: {{batch.kubernetes.io/job-name: {name}}}
  ports:
    - {{name: rendezvous, port: {PORT}}}
"""


def _job(job: Job, command: Command, name: str) -> str:
    limit = job.recipe.cluster.time_limit
    deadline = "" if limit is None else f"  activeDeadlineSeconds: {max(1, round(limit))}\n"
    return f"""\
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
  labels: {{app.kubernetes.io/name: bigtrain}}
spec:
  completionMode: Indexed
  completions: {job.most}
  parallelism: {job.most}
{deadline}{_success(job)}\
  backoffLimitPerIndex: {RETRIES}
  maxFailedIndexes: 0
  # A machine's new pod waits until its old one has saved and ended.
  podReplacementPolicy: Failed
  podFailurePolicy:
    rules:
      # Wrong input, and a run that does not fit: the same again would fail again.
      - action: FailJob
        onExitCodes: {{containerName: bigtrain, operator: In, values: [{InputError.exit_code}, {DoesNotFit.exit_code}]}}
      # Stopped after a checkpoint: go on from it.
      - action: Ignore
        onExitCodes: {{containerName: bigtrain, operator: In, values: [{Interrupted.exit_code}]}}
      # Preempted, evicted or drained.
      - action: Ignore
        onPodConditions: [{{type: DisruptionTarget, status: "True"}}]
  template:
    metadata:
      labels: {{app.kubernetes.io/name: bigtrain}}
    spec:
{_pod(job, command, name)}
"""


def _success(job: Job) -> str:
    """Return the policy by which an elastic job is done with its first pod: others may never have found a machine."""
    return '  successPolicy:\n    rules: [{succeededIndexes: "0"}]\n' if job.elastic else ""


def _pod(job: Job, command: Command, name: str) -> str:
    assert job.recipe.cluster.image is not None
    subdomain = "" if job.alone else f"      subdomain: {name}\n"
    limits = f"          resources:\n            limits: {{nvidia.com/gpu: {job.devices}}}\n" if job.cuda else ""
    return f"""\
{subdomain}\
      restartPolicy: Never
      # Killed after it; a checkpoint must be written by then.
      terminationGracePeriodSeconds: {SAVING_SECONDS}
      containers:
        - name: bigtrain
          image: {scalar(job.recipe.cluster.image)}
          workingDir: {KEPT}
          command:
{block(words(launch_words(job, command)), 12)}
          env:
            - {{name: BIGTRAIN_CACHE, value: {KEPT}/cache}}
{limits}\
          volumeMounts:
{block(MOUNTS, 12)}
      volumes:
{block(volumes(name, job.recipe), 8)}"""
