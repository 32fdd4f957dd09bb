#!/usr/bin/env bash
# Which variables say where a run reads and writes, and are they right? Sourced by the scripts that take them.
#
#   DATA_<NAME>  one variable a source of the recipe: a folder with manifest.json, or a URL; NAME in capitals
#   OUT          folder of the run; started again with the same one, the run continues from its newest checkpoint
#   ENV          virtual environment with requirements.txt
#   RECIPE       default m3i.internimage_h         DS_CONFIG  default ds_configs/zero3.json
#   SHM_GIB      shared memory that is asked for, default 8 GiB      EVALUATE_DATA  folder with train/ and heldout/

# shellcheck source=jobs/checks.sh
. "${root:?is not set: the repository, as the script that sources this one has found it}/jobs/checks.sh"

# What these variables say is not said a second time among the overrides of the recipe.
refuse_said() { # ARGUMENTS...
  refuse_arguments "--recipe RECIPE" "--out OUT" "--ds-config DS_CONFIG" "--ds_config DS_CONFIG" "--data DATA_<NAME>" -- "$@"
}

require_out() {
  : "${OUT:?is not set: name the folder of the run, on a disk with room for checkpoints}"
  OUT=$(realpath --canonicalize-missing --no-symlinks -- "$OUT")
  [[ ! -e $OUT || -d $OUT ]] || mistake "OUT=$OUT is no folder: name one for the run"
  export OUT
}

require_env() {
  : "${ENV:?is not set: name the virtual environment that holds requirements.txt (make venv VENV=...)}"
}

# The words NAME=DIR of every DATA_<NAME>, in the array `sources`.
name_sources() {
  local variable name
  sources=()
  for variable in $(compgen -A variable DATA_); do
    name=${variable#DATA_}
    [[ " ${sources[*]-}" != *" ${name,,}="* ]] ||
      mistake "$variable and another variable name the source ${name,,}: leave one of them out"
    sources+=("${name,,}=${!variable}")
  done
  ((${#sources[@]} > 0)) ||
    fail "no DATA_<NAME> is set: name the recipe's sources, such as DATA_LAION400M=/data/laion400m"
}

# The same, where they must be there, but those that a job builds first; what lies behind a URL is looked at by the run.
require_data() { # [DATA_<NAME> that is still built ...]
  local variable folder
  name_sources
  for variable in $(compgen -A variable DATA_); do
    [[ " $* " != *" $variable "* ]] || continue
    folder=${!variable}
    [[ $folder == *://* || -f $folder/manifest.json ]] ||
      fail "$variable=$folder holds no manifest.json: name a data set that python -m data_prep build has finished"
  done
}

require_ds_config() { # of the repository ROOT
  DS_CONFIG=${DS_CONFIG:-$1/ds_configs/zero3.json}
  export DS_CONFIG
  [[ -f $DS_CONFIG ]] || fail "DS_CONFIG=$DS_CONFIG is no file: name one of $1/ds_configs, or a JSON file of your own"
}

require_shared_memory() {
  local shm_kib
  : "${SHM_GIB:=8}"
  require_number SHM_GIB 0 "say how many GiB of shared memory are wanted"
  shm_kib=$(df --output=avail -k /dev/shm | tail -n 1)
  ((shm_kib >= SHM_GIB * 1024 * 1024)) ||
    fail "/dev/shm has $((shm_kib / 1024)) MiB free and NCCL and the loader want $SHM_GIB GiB:" \
      "start the container with --shm-size or --ipc=host, or lower SHM_GIB"
}

require_evaluation_data() {
  local split
  : "${EVALUATE_DATA:?is not set: name a folder with the data sets train/ and heldout/}"
  for split in train heldout; do
    [[ -d $EVALUATE_DATA/$split ]] || fail "EVALUATE_DATA=$EVALUATE_DATA has no $split/: name a folder that has both"
  done
}
