#!/usr/bin/env bash
# quickstart_gpt on Slurm: 2 machines x 2 GPUs. Printed by: bigtrain launch quickstart_gpt cluster.nodes=2
#     cluster.partition=gpu cluster.time_limit=36h cluster.devices_per_node=2 train.device=cuda
#     train.global_batch_size=48 --render slurm
# Start: sbatch FILE; further options, such as --account, on its command line.
# Here it says what is predicted.
#SBATCH --job-name=quickstart_gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
# Whole machines: without these a launcher gets one core, and memory for one.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --partition=gpu
#SBATCH --time=1-12:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120

set -euo pipefail
cd -- '/home/me/my runs'

# The launchers meet on the first machine, at a port of this job's own.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
rendezvous=${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))

code=0
srun --kill-on-bad-exit=0 --cpu-bind=none \
    /opt/bigtrain/bin/python -P -m bigtrain launch quickstart_gpt \
    cluster.nodes=2 \
    cluster.partition=gpu \
    cluster.time_limit=36h \
    cluster.devices_per_node=2 \
    train.device=cuda \
    train.global_batch_size=48 \
    cluster.rendezvous="$rendezvous" \
    --run-dir runs/quickstart_gpt || code=$?

if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"  # stopped after a checkpoint: go on from it
fi
exit "$code"
