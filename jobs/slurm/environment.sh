#!/usr/bin/env bash
# In which environment do the steps of a Slurm job run, and how does a job end? Sourced by every script beside it.
#
#   ENV                virtual environment with requirements.txt; in a container its own, if left out
#   CONTAINER          none (default), apptainer or pyxis
#   IMAGE              apptainer: a .sif file or an unpacked folder; pyxis: a .sqsh file or registry#name:tag
#   MOUNTS             PATH or PATH:PATH_INSIDE, several separated by blanks, beside those that are always mounted: the
#                      repository, ENV, OUT, LOGS, DS_CONFIG, EVALUATE_DATA and every DATA_<NAME>, at their own paths
#   CONTAINER_OPTIONS  of `apptainer exec` (default --nv), or of srun for pyxis
#   STEP_OPTIONS       more options of every srun, such as --mpi=none
#
# All variables of the submitting shell go into the job and its steps, so that NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME,
# NCCL_IB_HCA and the like are set there, once for all jobs.

root=${root:?is not set: the repository, as the script that sources this one has found it}
# shellcheck source=jobs/run_variables.sh
. "$root/jobs/run_variables.sh"
# shellcheck source=jobs/wait.sh
. "$root/jobs/wait.sh"

require_environment() {
  local is_path='^[./]'
  case ${CONTAINER:=none} in
    none) require_env ;;
    apptainer | pyxis)
      : "${IMAGE:?is not set and CONTAINER=$CONTAINER: name the image}"
      [[ ! $IMAGE =~ $is_path || -e $IMAGE ]] || fail "IMAGE=$IMAGE is not there: name the image, or unset CONTAINER"
      ;;
    *) fail "CONTAINER=$CONTAINER is unknown: choose from none, apptainer, pyxis" ;;
  esac
  [[ -z ${ENV:-} || -x $ENV/bin/python || $CONTAINER != none ]] ||
    fail "ENV=$ENV holds no bin/python: run \`make venv VENV=$ENV\` or name another folder"
}

# The arrays `step_options` and `container`: what srun is told, and what stands between it and a command; and `bin`, what
# stands before the name of a program of ENV.
set_environment() {
  local variable mounts=()
  require_environment
  # Sites set other defaults. A node that ended must not end those that still save, nor may it leave them waiting for
  # ever: ten minutes. A task has all CPUs of its node that the job has.
  step_options=(--export=ALL --kill-on-bad-exit=0 --wait="${SLURM_WAIT:-600}" --cpu-bind=none)
  # shellcheck disable=SC2206 # words are wanted: options
  step_options+=(${STEP_OPTIONS:-})
  container=()
  # shellcheck disable=SC2034 # of those who source this
  bin=${ENV:+$ENV/bin/}
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  if [[ $CONTAINER == none ]]; then
    PATH=$(realpath -- "$ENV")/bin:$PATH
    export PATH
    return
  fi
  mounts=("$root")
  for variable in ENV OUT LOGS DS_CONFIG EVALUATE_DATA $(compgen -A variable DATA_); do
    case ${!variable:-} in
      "" | *://*) ;;
      /*) mounts+=("${!variable}") ;;
      *) fail "$variable=${!variable} is a relative path, which means another place in a container: give it from /" ;;
    esac
  done
  # shellcheck disable=SC2206 # words are wanted: paths
  mounts+=(${MOUNTS:-})
  case $CONTAINER in
    apptainer)
      command -v apptainer >/dev/null ||
        fail "apptainer is not on PATH of $(hostname): load its module in the job, or set CONTAINER=none"
      # shellcheck disable=SC2206
      container=(apptainer exec ${CONTAINER_OPTIONS---nv} --bind "$(IFS=,; echo "${mounts[*]}")" "$IMAGE")
      ;;
    pyxis)
      # shellcheck disable=SC2206
      step_options+=(--container-image="$IMAGE" --container-mounts="$(with_inside "${mounts[@]}")" ${CONTAINER_OPTIONS:-})
      ;;
  esac
}

with_inside() { # PATH [PATH:PATH_INSIDE ...] as pyxis wants them, which needs both
  local mount joined=""
  for mount in "$@"; do
    [[ $mount == *:* ]] || mount=$mount:$mount
    joined+=,$mount
  done
  echo "${joined#,}"
}

# One task a node in the environment, in the background, its number in `step`.
start_step() { # NODES COMMAND ...
  local nodes=$1
  shift
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 "${step_options[@]}" \
    ${container[@]+"${container[@]}"} "$@" &
  step=$!
}

# SIGUSR1 and not SIGTERM: at that srun kills its tasks.
is_asked=0
ask_step() {
  is_asked=1
  kill -s USR1 "$step" 2>/dev/null || true
}

# The code of the step in `code`, though Slurm asks this script to stop meanwhile.
wait_for_step() {
  trap ask_step TERM USR1
  wait_for_end "$step"
  trap 'is_asked=1' TERM USR1 # what is left takes a moment, and a requeue asks this script, too
}

run_step() { # NODES COMMAND ...; the code of its end, that of SIGTERM if this script was asked to stop before it
  ((is_asked == 0)) || return 143
  start_step "$@"
  wait_for_step
  return "$code"
}

# Of an array this task alone: the number of one task is also that of the whole.
requeue() {
  local job=$SLURM_JOB_ID state
  [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  # Once a job is cancelled, or requeued by an operator or by Slurm, it no longer runs; it would come back all the same.
  state=$(scontrol show job --oneliner "$job" 2>/dev/null | sed -nE 's/.* JobState=([A-Z_]+).*/\1/p') || true
  if [[ ${state:-RUNNING} == RUNNING ]] && scontrol requeue "$job"; then return; fi
  echo "[slurm] not requeued by this script${state:+: the job is $state}" >&2
}
