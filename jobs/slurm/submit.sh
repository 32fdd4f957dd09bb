#!/usr/bin/env bash
# How does one command take a run through a Slurm queue? Data, pre-training, evaluation and export as a chain of jobs:
#
#   BUILD_CC12M="cc12m --from /lists/cc12m.tsv --scratch /scratch/cc12m --out /data/cc12m" DATA_CC12M=/data/cc12m \
#   DATA_IMAGENET22K=/data/imagenet22k/train OUT=/runs/h ENV=/envs/m3i EVALUATE_DATA=/data/imagenet1k \
#   NODES=4 GPUS=8 OPTIONS_PRETRAIN="--time=2-0" SBATCH_PARTITION=gpu SBATCH_ACCOUNT=vision \
#     jobs/slurm/submit.sh [--dry-run] [typed overrides of the recipe, such as --batch 2048]
#
# It checks what can be checked here, submits, and prints the number of every job and where its output goes. A job waits
# until those before it have succeeded (afterok), and is cancelled when one has failed. --dry-run only prints the commands.
#
#   NODES          nodes that pre-train              GPUS     of each; default none asked for
#   DATA_<NAME>, OUT, RECIPE, DS_CONFIG, SHM_GIB     of pre-training, see jobs/run_variables.sh
#   ENV, CONTAINER, IMAGE, MOUNTS, ...               of all jobs, see jobs/slurm/environment.sh
#   BUILD_<NAME>   arguments of `python -m data_prep build` that make a data set first, separated by blanks
#   TASKS          of each array that builds one; default 16
#   EVALUATE_DATA  folder with train/ and heldout/; without, nothing is evaluated
#   EXPORT_TO      formats, separated by blanks; default safetensors; empty exports nothing
#   OPTIONS_PREPARE, OPTIONS_PRETRAIN, OPTIONS_EVALUATE, OPTIONS_EXPORT   more options of sbatch for one kind of job;
#                  for all of them there are sbatch's own variables, such as SBATCH_PARTITION, SBATCH_ACCOUNT
#   EVALUATE_ARGUMENTS, EXPORT_ARGUMENTS   of python -m pretrain.evaluate and pretrain.export
set -euo pipefail
root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")
# shellcheck source=jobs/slurm/environment.sh
. "$root/jobs/slurm/environment.sh"

is_dry=0 overrides=()
for argument in "$@"; do
  if [[ $argument == --dry-run ]]; then is_dry=1; else overrides+=("$argument"); fi
done
set -- ${overrides[@]+"${overrides[@]}"}
refuse_said "$@"
require_out
require_environment
require_ds_config "$root"
: "${NODES:?is not set: say how many nodes pre-train}"
: "${TASKS:=16}" "${GPUS:=0}" "${EXPORT_TO=safetensors}"
require_number NODES 1 "say how many nodes pre-train"
require_number TASKS 1 "say how many tasks build a data set"
require_number GPUS 0 "say how many GPUs of a node are asked for"
[[ -z ${RESTARTS:-} ]] || require_number RESTARTS 1 "say how many starts may be in vain"
[[ -z ${PREPARE_RESTARTS:-} ]] || require_number PREPARE_RESTARTS 0 "say how often a task may be asked to stop"
[[ -z ${SHM_GIB:-} ]] || require_number SHM_GIB 0 "say how many GiB of shared memory are wanted"
require_switch PREFLIGHT
for format in $EXPORT_TO; do
  grep --quiet "^    \"$format\": Exporter(" "$root/pretrain/export/formats.py" ||
    mistake "EXPORT_TO=$EXPORT_TO has $format, which is no format: \`python -m pretrain.export --help\` lists them"
done
mapfile -t builds < <(compgen -A variable BUILD_)
awaited=() # sources that lie in what a job builds first
for build in ${builds[@]+"${builds[@]}"}; do
  [[ " ${!build}" =~ \ --out[=\ ]([^ ]+) ]] || fail "$build=${!build} names no --out: give the data set's folder or URL"
  for variable in $(compgen -A variable DATA_); do
    [[ ${!variable}/ != "${BASH_REMATCH[1]%/}"/* ]] || awaited+=("$variable")
  done
done
require_data ${awaited[@]+"${awaited[@]}"}
((is_dry)) || command -v sbatch >/dev/null || fail "sbatch is not on PATH: start this where jobs are submitted"

((${#builds[@]})) || [[ -z ${EVALUATE_DATA:-} ]] || require_evaluation_data

logs=$OUT/logs
submitted=()
give_up() {
  echo "a job was refused, see above; cancels those submitted before it: ${submitted[*]:-none}" >&2
  ((${#submitted[@]} == 0)) || scancel "${submitted[@]}"
}

# Its number in `job`.
submit() { # WHAT AFTER(numbers with colons, or empty) OPTIONS... -- SCRIPT ARGUMENTS...
  local what=$1 after=$2 options=() pattern=%j
  shift 2
  while [[ $1 != -- ]]; do
    [[ $1 != --array=* ]] || pattern=%A_%a
    options+=("$1")
    shift
  done
  shift
  [[ -z $after ]] || options+=(--dependency="afterok:$after" --kill-on-invalid-dep=yes)
  options+=(--parsable --export=ALL --output="$logs/$what-$pattern.txt")
  if ((is_dry)); then
    job=${what^^} # where its number will be
    printf '%q ' sbatch "${options[@]}" "$root/jobs/slurm/$1" "${@:2}"
    echo
    return
  fi
  job=$(sbatch "${options[@]}" "$root/jobs/slurm/$1" "${@:2}") || { give_up; exit 1; }
  job=${job%%;*} # another cluster's name may follow
  submitted+=("$job")
  printf '%-28s job %-10s %-26s output %s\n' "$what" "$job" "${after:+after $after}" \
    "$logs/$what-${pattern//%[jA]/$job}.txt"
}

export M3I_ROOT=$root
((is_dry)) || mkdir -p -- "$logs" 2>/dev/null || mistake "OUT=$OUT cannot be made or written: name another folder"
data=""
for build in ${builds[@]+"${builds[@]}"}; do
  name=${build#BUILD_} name=${name,,}
  read -ra arguments <<<"${!build}"
  # shellcheck disable=SC2086 # words are wanted, here and below: options
  submit "prepare-$name" "" --array="1-$TASKS" ${OPTIONS_PREPARE:-} -- prepare.sh "${arguments[@]}"
  # shellcheck disable=SC2086
  submit "check-$name" "$job" ${OPTIONS_PREPARE:-} -- prepare.sh "${arguments[@]}"
  data+=:$job
done
gpus=()
((GPUS == 0)) || gpus=(--gpus-per-node="$GPUS")
# shellcheck disable=SC2086
submit pretrain "${data#:}" --nodes="$NODES" ${gpus[@]+"${gpus[@]}"} ${OPTIONS_PRETRAIN:-} -- pretrain.sh "$@"
pretrain=$job
if [[ -n ${EVALUATE_DATA:-} ]]; then
  # shellcheck disable=SC2086
  submit evaluate "$pretrain" ${gpus[@]+"${gpus[@]}"} ${OPTIONS_EVALUATE:-} -- evaluate.sh ${EVALUATE_ARGUMENTS:-}
fi
if [[ -n $EXPORT_TO ]]; then
  # shellcheck disable=SC2086
  submit export "$pretrain" ${OPTIONS_EXPORT:-} -- export.sh ${EXPORT_ARGUMENTS:-}
fi
((is_dry)) || echo "what the ranks print: $logs/$pretrain.RESTART; watch: squeue --jobs $(IFS=,; echo "${submitted[*]}")"
