#!/usr/bin/env bash
# quickstart_gpt on Slurm: 1 machine x 1 process. Printed by: bigtrain launch quickstart_gpt train.device=cpu
#     --render slurm
# Start: sbatch FILE; further options, such as --account, on its command line.
# Here it says what is predicted.
#SBATCH --job-name=quickstart_gpt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
# Whole machines: without these a launcher gets one core, and memory for one.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120

set -euo pipefail
cd -- '/home/me/my runs'

code=0
srun --kill-on-bad-exit=0 --cpu-bind=none \
    /opt/bigtrain/bin/python -P -m bigtrain launch quickstart_gpt \
    train.device=cpu \
    --run-dir runs/quickstart_gpt || code=$?

if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"  # stopped after a checkpoint: go on from it
fi
exit "$code"
