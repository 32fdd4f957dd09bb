#!/usr/bin/env bash
# What does one node do in a pre-training job? It takes its number from Slurm and starts its ranks. Started by srun.
#
# jobs/slurm/pretrain.sh sets MASTER_ADDR, MASTER_PORT, LOGS, PREFLIGHT and the variables of the run. All that this node
# prints goes to LOGS/node_<number>-<name>.txt, what its ranks print to a file each beside it.
#
# DeepSpeed's own `--launcher slurm` starts one task a rank and sets neither RANK nor LOCAL_RANK nor WORLD_SIZE (it
# counts on MPI's variables), and needs its launcher's Python and pdsh-like rights on the first node. One `--no_ssh`
# launcher a node works wherever srun does, in a container too, and is what other clusters use.
set -euo pipefail
root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")
# shellcheck source=jobs/slurm/environment.sh
. "$root/jobs/slurm/environment.sh"

export NODES=${SLURM_STEP_NUM_NODES:?is not set: this script is started by srun, see jobs/slurm/pretrain.sh}
export NODE_RANK=$SLURM_NODEID
export RANKS=${RANKS:-${SLURM_GPUS_ON_NODE:-}} # none said and none given: as jobs/local/pretrain.sh counts them
if [[ -z ${ENV:-} ]]; then # of the image
  launcher=$(command -v deepspeed) || { echo "deepspeed is not on PATH of the image: set ENV" >&2; exit "${RAISED[1]}"; }
  ENV=$(dirname -- "$(dirname -- "$launcher")")
  export ENV
fi
mkdir -p -- "$LOGS"
exec >>"$LOGS/node_$NODE_RANK-${SLURMD_NODENAME:-$(hostname)}.txt" 2>&1

# A script that hears while it waits; Slurm's signal reaches the other processes of this task by itself or from here.
is_interrupted=0 job=""
pass_on() {
  is_interrupted=1
  [[ -z $job ]] || kill -s USR1 "$job" 2>/dev/null || true
}
trap pass_on TERM USR1
"$root/jobs/single_node/pretrain.sh" "$@" &
job=$!
while true; do
  is_interrupted=0 code=0
  wait "$job" || code=$?
  ((is_interrupted)) || break
done
echo "[slurm] node $NODE_RANK (${SLURMD_NODENAME:-}) ended with code $code"
exit "${RAISED[$code]:-$code}"
