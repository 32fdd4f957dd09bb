#!/usr/bin/env bash
# What does one node do in a pre-training job? It takes its number from Slurm and starts its ranks. Started by srun.
#
# jobs/slurm/pretrain.sh sets MASTER_ADDR, MASTER_PORT, LOGS, PREFLIGHT and the variables of the run. LOGS gets
# node_<number>-<name>.txt of all that this node prints, a file of each rank, and node_<number>.code, how it ended.
#
# One `--no_ssh` launcher a node works wherever srun does, in containers too, and is what other clusters use. DeepSpeed's
# `--launcher slurm` starts a task a rank with neither RANK nor LOCAL_RANK nor WORLD_SIZE, which leaves them to MPI; and
# its srun takes the place of this one, with whose options, container and codes the job could not deal.
set -euo pipefail
root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")
# shellcheck source=jobs/wait.sh
. "$root/jobs/wait.sh"

export NODES=${SLURM_STEP_NUM_NODES:?is not set: this script is started by srun, see jobs/slurm/pretrain.sh}
export NODE_RANK=$SLURM_NODEID
export RANKS=${RANKS:-${SLURM_GPUS_ON_NODE:-}} # none said and none given: as jobs/local/pretrain.sh counts them
mkdir -p -- "$LOGS"
exec >>"$LOGS/node_$NODE_RANK-${SLURMD_NODENAME:-$(hostname)}.txt" 2>&1

# srun's own code is the highest of all nodes, or that of a signal: pretrain.sh reads what each node said.
tell_code() {
  local code=$?
  echo "[slurm] node $NODE_RANK (${SLURMD_NODENAME:-$(hostname)}) ended with code $code"
  echo "$code" >"$LOGS/.node_$NODE_RANK.code"
  mv -- "$LOGS/.node_$NODE_RANK.code" "$LOGS/node_$NODE_RANK.code"
}
trap tell_code EXIT

if [[ -z ${ENV:-} ]]; then # of the image
  launcher=$(command -v deepspeed) || { echo "deepspeed is not on PATH of IMAGE=$IMAGE: set ENV"; exit 1; }
  ENV=$(dirname -- "$(dirname -- "$launcher")")
  export ENV
fi

job=""
pass_on() {
  [[ -z $job ]] || kill -s USR1 "$job" 2>/dev/null || true
}
trap pass_on TERM USR1
"$root/jobs/single_node/pretrain.sh" "$@" &
job=$!
wait_for_end "$job"
trap '' TERM USR1 # the end takes a moment
exit "$code"
