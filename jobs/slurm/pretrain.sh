#!/usr/bin/env bash
# How do I pre-train on N nodes of a Slurm queue that takes nodes away?
#
#   DATA_<NAME>=... OUT=... ENV=... sbatch --nodes=4 --gpus-per-node=8 --time=2-0 \
#     jobs/slurm/pretrain.sh [typed overrides of the recipe, such as --batch 2048]
#
# Ten minutes before its time is over, when a node is wanted for another job (SIGTERM, SIGUSR1), or on
# `scancel --signal=USR1 --batch JOB`, the run saves, ends, and goes into the queue again; so it does when a rank or a
# node was lost. What would fail again ends the job with its code, pretrain/exits.py has them all.
#
#   DATA_<NAME>, OUT, RECIPE, DS_CONFIG, SHM_GIB   see jobs/run_variables.sh; OUT is on a disk that all nodes share
#   ENV, CONTAINER, IMAGE, MOUNTS, ...             see jobs/slurm/environment.sh
#   RANKS        of a node; default: one a GPU       LOGS         default OUT/logs/JOB.RESTART: a file a node, one a rank
#   PREFLIGHT    default 1 on more than one node     RESTARTS     in a row without a new step, then it ends; default 5
#   MASTER_ADDR  default: the first node's address as Slurm knows it
#   MASTER_PORT  default: 20000 to 29999, by number of the job and restart
#   M3I_ROOT     the repository, since Slurm runs a copy of this file; default: where sbatch was
#
# A job that shares its nodes: sbatch --oversubscribe --cpus-per-task=32 --mem=200G --gpus-per-node=4 ...
#SBATCH --job-name=m3i-pretrain
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -euo pipefail

root=${M3I_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=jobs/slurm/environment.sh
. "$root/jobs/slurm/environment.sh" ||
  { echo "M3I_ROOT=$root is not the repository: set it, or start sbatch there" >&2; exit 1; }
# shellcheck source=jobs/restarts.sh
. "$root/jobs/restarts.sh"

refuse_said "$@"
require_out
require_environment
require_data
require_ds_config "$root"
: "${RESTARTS:=5}"
require_number RESTARTS 1 "say how many starts may be in vain"
require_switch PREFLIGHT
set_environment

# An address, since names of nodes need not resolve: from the controller, older ones (before 23.02) tell the node's.
address_of() {
  local told
  told=$(scontrol getaddrs "$1" 2>/dev/null | sed -nE 's/^[^ ]+: *\[?([^]]*[^]:])\]?:[0-9]+$/\1/p')
  [[ -n $told ]] || told=$(scontrol show node "$1" | sed -nE 's/.*NodeAddr=([^ ]+).*/\1/p')
  echo "${told:-$1}"
}

# The code of the job in `code`, from what the nodes said and srun's own: an error that was told, by one node, wins over
# nodes that were lost or killed thereupon; a node that said nothing was lost.
combine() {
  local file said final told=() num_well=0
  for file in "$LOGS"/node_*.code; do
    [[ -f $file ]] || continue
    said=$(<"$file")
    told+=("$said")
    if ((said == 0 || said == 75)); then num_well=$((num_well + 1)); fi
  done
  for final in 65 2 1; do
    if [[ " ${told[*]-} " == *" $final "* ]]; then code=$final; return; fi
  done
  if ((code != 0)); then code=$((num_well == nodes ? 75 : 76)); fi
}

# What told of an error, so that nobody has to search the files of many nodes: ranks' errors, and the first nodes' last lines.
tell_failed() {
  local file number shown=0
  grep --no-messages --no-filename '^error: ' "$LOGS"/*_rank*.log | sort --unique | head -n 3 || true
  for file in "$LOGS"/node_*.code; do
    [[ -f $file && ! $(<"$file") =~ ^(0|75)$ ]] || continue
    if ((++shown > 3)); then break; fi
    number=${file##*/node_} number=${number%.code}
    tail -n 4 -- "$LOGS/node_$number"-*.txt | sed "s/^/[slurm] node $number: /"
  done
}

# Whether the job may go into the queue again: not when RESTARTS starts in a row came to no new step.
may_requeue() {
  gets_on "$OUT/slurm_restarts" "$SLURM_JOB_ID" && return
  echo "[slurm] $((vain + 1)) starts came to no step beyond $most: not requeued. Look at $LOGS, then" \
    "\`scontrol requeue $SLURM_JOB_ID\` or the same sbatch goes on from the newest checkpoint" >&2
  return 1
}

nodes=${SLURM_JOB_NUM_NODES:?is not set: start this script by sbatch, see its head} restart=${SLURM_RESTART_COUNT:-0}
names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${MASTER_ADDR:-$(address_of "${names%%$'\n'*}")}
# Below the ports that Linux gives to outgoing connections; another one at every restart.
export MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 7 + restart) % 10000))}
export PREFLIGHT=${PREFLIGHT:-$((nodes > 1))}
export LOGS=${LOGS:-$OUT/logs/$SLURM_JOB_ID.$restart}
export M3I_STARTS_COUNTED=1 # by may_requeue: a bucket that fails at a start is waited for (pretrain/resume.py)
mkdir -p -- "$OUT" "$LOGS"

echo "[slurm] $(date --iso-8601=seconds) job $SLURM_JOB_ID, restart $restart: $nodes nodes ($SLURM_JOB_NODELIST)," \
  "meeting at $MASTER_ADDR:$MASTER_PORT, logs in $LOGS"
rm -f -- "$LOGS"/node_*.code
code=0
run_step "$nodes" "$root/jobs/slurm/node.sh" "$@" || code=$?
combine
echo "[slurm] $(date --iso-8601=seconds) ended with code $code after step $(step_reached)"
case $code in
  0) ;;
  75 | 76) ! may_requeue || requeue ;;
  *)
    tell_failed >&2
    echo "[slurm] the same command would end so again: see $LOGS" >&2
    ;;
esac
exit "$code"
