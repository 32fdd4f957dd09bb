#!/usr/bin/env bash
# How does a Slurm queue build a data set? As the tasks of an array, and a job after them that finishes and checks.
#
#   export ENV=/envs/m3i
#   array=$(sbatch --parsable --array=1-16 jobs/slurm/prepare.sh laion400m --from s3://lists/relaion ... --out DIR)
#   sbatch --dependency=afterok:$array jobs/slurm/prepare.sh laion400m --from s3://lists/relaion ... --out DIR
#
# The arguments are those of `python -m data_prep build`, the same for both; `--workers` is the CPUs of the task, which
# --cpus-per-task says (default 2), unless it is given. A task of an array makes its share of the shards (--part slurm);
# without an array this makes what is missing, the manifest, and reads every byte again. A task that comes to its time
# limit finishes the shards in the making and goes into the queue again; so does one that Slurm ends for another job, whose
# shards in the making are made again. One that failed is submitted again. `--mem` is that of --workers.
#
#   ENV, CONTAINER, IMAGE, MOUNTS, ...   see jobs/slurm/environment.sh; folders of the arguments go into MOUNTS
#   PREPARE_RESTARTS   of a task that is asked to stop, then it ends; default 50
#   M3I_ROOT   the repository, since Slurm runs a copy of this file; default: where sbatch was
#SBATCH --job-name=m3i-prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

root=${M3I_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=jobs/slurm/environment.sh
. "$root/jobs/slurm/environment.sh" ||
  { echo "M3I_ROOT=$root is not the repository: set it, or start sbatch there" >&2; exit 1; }

: "${PREPARE_RESTARTS:=50}"
require_number PREPARE_RESTARTS 0 "say how often a task may be asked to stop"
out="" arguments=("$@") has_workers=0
while (($#)); do
  case $1 in
    --out) out=${2:-} ;;
    --out=*) out=${1#--out=} ;;
    --workers | --workers=*) has_workers=1 ;;
  esac
  shift
done
[[ -n $out ]] || fail "no --out: give the arguments of \`python -m data_prep build\`, such as scenes --out DIR"
set_environment
((has_workers)) || arguments+=(--workers "${SLURM_CPUS_PER_TASK:-2}")

in_step() {
  code=0
  run_step 1 "$root/jobs/slurm/task.sh" "${bin}python" -m data_prep "$@" || code=$?
  if ((code == 143 || (code != 0 && is_asked))); then # asked to stop, perhaps before the build could hear it
    if ((${SLURM_RESTART_COUNT:-0} < PREPARE_RESTARTS)); then
      requeue
    else
      echo "[slurm] restarted $PREPARE_RESTARTS times: not requeued; is its time too short for a shard?" >&2
    fi
  fi
  ((code == 0)) || exit "$code"
}

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  in_step build "${arguments[@]}" --part slurm
else
  in_step build "${arguments[@]}"
  in_step check "$out"
fi
