#!/usr/bin/env bash
# How does a Slurm queue export a run? On one node when pre-training is done:
#
#   OUT=/runs/h EXPORT_TO="internimage huggingface" ENV=/envs/m3i \
#     sbatch --dependency=afterok:JOB jobs/slurm/export.sh [options of python -m pretrain.export]
#
#   OUT         folder of the run        EXPORT_TO   formats, separated by blanks; default safetensors
#   ENV, CONTAINER, IMAGE, MOUNTS, ...   see jobs/slurm/environment.sh
#   M3I_ROOT    the repository, since Slurm runs a copy of this file; default: where sbatch was
#SBATCH --job-name=m3i-export
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
set_environment

read -ra formats <<<"${EXPORT_TO:-safetensors}"
run_step 1 "${bin}python" -m pretrain.export "$OUT" --to "${formats[@]}" "$@"
