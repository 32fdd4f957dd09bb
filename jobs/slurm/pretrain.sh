#!/usr/bin/env bash
# How do I pre-train in a Slurm queue that takes nodes away? `sbatch jobs/slurm/pretrain.sh [overrides of the recipe]`
#
# The variables are those of jobs/single_node/pretrain.sh, exported before sbatch. Ten minutes before its time is over,
# or when the node is wanted for another job, the run saves and ends, and the job is put into the queue again; so it is
# when a rank was lost. M3I_ROOT names the repository, since Slurm runs a copy of this file; default: where sbatch was.
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -uo pipefail

root=${M3I_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
"$root/jobs/single_node/pretrain.sh" "$@" &
job=$!
pass_on() {
  is_interrupted=1
  kill -s USR1 "$job" 2>/dev/null || true
}
trap pass_on TERM USR1

while true; do
  is_interrupted=0 code=0
  wait "$job" || code=$?
  ((is_interrupted)) || break
done
case $code in
  75 | 76) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
