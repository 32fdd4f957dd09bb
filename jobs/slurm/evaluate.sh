#!/usr/bin/env bash
# How does a Slurm queue evaluate a run? On the GPUs of one node, or its CPU, when pre-training is done:
#
#   OUT=/runs/h EVALUATE_DATA=/data/imagenet1k ENV=/envs/m3i \
#     sbatch --gpus-per-node=8 --dependency=afterok:JOB jobs/slurm/evaluate.sh [options of python -m pretrain.evaluate]
#
#   OUT             folder of the run                EVALUATE_DATA   folder with train/ and heldout/
#   ENV, CONTAINER, IMAGE, MOUNTS, ...   see jobs/slurm/environment.sh
#   M3I_ROOT        the repository, since Slurm runs a copy of this file; default: where sbatch was
#SBATCH --job-name=m3i-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

root=${M3I_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=jobs/slurm/environment.sh
. "$root/jobs/slurm/environment.sh" ||
  { echo "M3I_ROOT=$root is not the repository: set it, or start sbatch there" >&2; exit 1; }

require_out
require_evaluation_data
set_environment

start=("${bin}python" -m)
if ((${SLURM_GPUS_ON_NODE:-1} > 1)); then start=("${bin}torchrun" --standalone --nproc-per-node "$SLURM_GPUS_ON_NODE" -m); fi
run_step 1 "${start[@]}" pretrain.evaluate "$OUT" --data "$EVALUATE_DATA" "$@"
